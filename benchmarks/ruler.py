"""The ruler of the benchmarks: many held-out sentences, and how far predictions move from the dense model's on them.

872 sentences of dev know an accuracy to a point; methods differ by tenths. Ten thousand held-out training sentences,
and the divergence of the predicted distributions, which sees every change of every sentence, tell them apart.
"""

from __future__ import annotations

import base64
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import harness
import numpy as np

POOL = 4096  # calibration sentences of all seeds, and those of a polish
MIN_SCORED_WORDS = 9  # of a sentence that is scored


class Mean(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float

    def text(self, digits: int = 2) -> str:
        """Both, in a cell of a table."""
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


def split_rows(sentences: Sequence[str], held_out: int, min_words: int) -> tuple[list[int], list[int]]:
    """Split training rows: a pool that calibration draws from, and rows that are scored and used for nothing else.

    Args:
        sentences: All training sentences.
        held_out: How many to score.
        min_words: Words of a calibration sentence.

    Returns:
        Rows that are scored, which share no five words in a row with the pool, and the rows of the pool.
    """
    from hf_prune.evaluation.data.overlap import overlapping

    words = [len(text.split()) for text in sentences]
    pool = harness.shuffled([i for i, count in enumerate(words) if count >= min_words], 2**31)[:POOL]
    others = sorted({i for i, count in enumerate(words) if count >= MIN_SCORED_WORDS} - set(pool))
    overlaps = overlapping([sentences[i] for i in others], [sentences[i] for i in pool])
    free = [i for i, shared in zip(others, overlaps, strict=True) if not shared]
    if len(free) < held_out:
        raise SystemExit(f"only {len(free):,} sentences share nothing with calibration: ask for at most as many")
    return harness.shuffled(free, 2**31)[:held_out], pool


def score(model: Any, tokenizer: Any, **splits: Any) -> dict[str, Any]:
    """What a classifier predicts on splits, by name: which sentences are right, and the log-probabilities."""
    from hf_prune import evaluate_classification
    from hf_prune.evaluation.divergence import unpack_rows
    from hf_prune.kernels.fast_products import fast_products

    found = {}
    with fast_products(model.parameters()):
        for name, data in splits.items():
            scored = evaluate_classification(model, tokenizer, data, batch_size=64)
            found[name] = predictions(unpack_rows(scored.distributions), scored.labels)
    return found


def predictions(rows: Any, labels: Sequence[int]) -> dict[str, Any]:
    """What :func:`score` returns for a split.

    Args:
        rows: (n, classes) log-probabilities.
        labels: The right classes.
    """
    rows = np.asarray(rows, dtype="<f4")
    right = "".join(str(int(row.argmax() == label)) for row, label in zip(rows, labels, strict=True))
    return {"right": right, "log_probabilities": base64.b64encode(rows.tobytes()).decode()}


class Scored:
    """What is known of one method: its predictions for each seed, beside the dense model's.

    Args:
        dense: What :func:`score` returned for the dense model, of one split.
        runs: The same of the pruned model, for each calibration seed.
    """

    def __init__(self, dense: Any, runs: Sequence[Any]) -> None:
        from hf_prune.evaluation.divergence import kl_of_examples

        before, after = _rows(dense), [_rows(run) for run in runs]
        right = _digits(dense)
        self.kl = np.array([kl_of_examples(before, rows) for rows in after])  # (seeds, n)
        self.flips = np.array([100.0 * (before.argmax(1) != rows.argmax(1)) for rows in after])
        self.drop = np.array([100.0 * (right - _digits(run)) for run in runs])

    def mean(self, measure: str) -> Mean:
        """A measure over sentences and seeds."""
        return mean_of(getattr(self, measure))

    def minus(self, other: Scored, measure: str) -> Mean:
        """How much larger a measure is than that of another method, seed by seed and sentence by sentence."""
        mine, theirs = (np.asarray(getattr(scored, measure)) for scored in (self, other))
        if len(mine) == len(theirs):
            return mean_of(mine - theirs)
        return mean_of(mine - theirs.mean(0))  # one of them does not depend on the seed, or has fewer


def mean_of(values: Any) -> Mean:
    """The mean of values (seeds, n), with an error from the sentences and one from the draw of calibration data.

    The first is that of the mean over sentences of what the seeds have on average; the second that of the mean over the
    seeds. Their squares are added.
    """
    by_sentence, by_seed = values.mean(0), values.mean(1)
    square = by_sentence.var(ddof=1) / len(by_sentence)
    if len(by_seed) > 1:
        square += statistics.variance(by_seed.tolist()) / len(by_seed)
    return Mean(float(values.mean()), float(square**0.5))


def _rows(scored: Any) -> Any:
    rows = np.frombuffer(base64.b64decode(scored["log_probabilities"]), dtype="<f4")
    return rows.reshape(len(scored["right"]), -1).astype(np.float64)


def _digits(scored: Any) -> Any:
    return np.array([int(digit) for digit in scored["right"]], dtype=np.float64)
