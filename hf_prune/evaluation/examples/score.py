"""The score of a model with what is kept of each example, and the comparison of two on the same examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np

from hf_prune.errors import DataError
from hf_prune.evaluation.divergence import read_distributions, saved_divergence, stored_rows
from hf_prune.evaluation.examples.kinds import find_kind
from hf_prune.evaluation.examples.metrics import resampled
from hf_prune.evaluation.saved_scores import check_counted, check_error, check_fields, data_name, is_finite_number
from hf_prune.evaluation.sentence_result import SentenceComparison
from hf_prune.evaluation.statistics import check_confidence
from hf_prune.utils.results import Result


@dataclass(frozen=True, repr=False)
class ExampleScore(Result):
    """How well a model does a task, by one metric.

    Attributes:
        kind: The kind of task, such as ``"token-classification"``.
        metric: What the metric is called, such as ``"entity F1"``.
        name: Its name as an option, such as ``"f1"``.
        value: The score.
        n: Number of examples.
        standard_error: Of the value, by bootstrap over the examples.
        kept: What is kept of each example, in the order of the data; see :mod:`hf_prune.evaluation.examples.metrics`.
        split: Name of the split.
        source: Where the data came from.
        data_fingerprint: Hash of the inputs and labels.
        seconds: Wall time of reading and predicting.
        dtype: Of the weights, such as ``float32``.
        max_length: Longer inputs were cut to this many tokens; 0 where there are none.
        batch_size: Examples per forward pass.
        distributions: What is predicted for each example, as :func:`hf_prune.evaluation.divergence.pack_rows` writes
            it: log-probabilities of classes, or logits of several labels; empty for kinds without distributions.
    """

    bars: ClassVar[tuple[str, ...]] = ("value",)

    kind: str
    metric: str
    name: str
    value: float
    n: int
    standard_error: float
    kept: tuple[tuple[float, ...], ...]
    split: str
    source: str
    data_fingerprint: str
    seconds: float
    dtype: str
    max_length: int
    batch_size: int
    distributions: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line: the score and its standard error, n, and the data."""
        return f"{self.metric} {self.value:.4f} ± {self.standard_error:.4f} (n = {self.n:,}, {data_name(self)})"

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON; no distributions where they are more than 200,000 numbers (n times classes)."""
        lists = {"kept": [list(row) for row in self.kept], "distributions": stored_rows(self.distributions)}
        return {**asdict(self), **lists}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExampleScore:
        """The inverse of ``to_dict``; the score is computed again from the rows.

        Raises:
            DataError: If a field is missing or unknown, or the score is not what the rows give.
        """
        check_fields(cls, values, "score of examples", optional=("distributions",))
        rows = values["kept"]
        widths = (
            {len(row) for row in rows if isinstance(row, list | tuple)} if isinstance(rows, list | tuple) else set()
        )
        if (
            not rows
            or len(widths) != 1
            or not all(is_finite_number(x) for row in rows for x in row)
            or values["n"] != len(rows)
        ):
            raise DataError(
                f"not a saved score of examples: n is {values['n']!r}, and what is kept is not as many rows"
            )
        counted = summarise(str(values["kind"]), str(values["name"]), rows)
        check_counted(values, counted, "what is kept of the examples gives", 1e-6)
        kind = find_kind(str(values["kind"]))
        predictions = None if kind.several_labels else [row[0] for row in rows]
        lists = {
            "kept": tuple(tuple(map(float, row)) for row in rows),
            "distributions": read_distributions(values, len(rows), predictions),
        }
        return cls(**{**values, **counted, **lists})


def check_examples(values: Mapping[str, Any]) -> None:
    """Check that a score can be true, also one whose kept examples were left out.

    Args:
        values: Of :meth:`ExampleScore.to_dict`.

    Raises:
        DataError: If it cannot.
    """
    metric, value = find_kind(str(values["kind"])).metric(str(values["name"])), values["value"]
    if not is_finite_number(value) or value > 1 or (value < -1 and metric.is_bounded):
        raise DataError(f"value is {value!r}: expected a number of at most 1")
    check_error(values)
    if values.get("kept") is not None:
        ExampleScore.from_dict(values)


def summarise(kind: str, name: str, rows: Any) -> dict[str, Any]:
    """The value of a metric, its standard error, and how many examples there are.

    Args:
        kind: The kind of task.
        name: The metric, as an option.
        rows: What is kept of each example.

    Raises:
        ConfigError: If the kind has no such metric.
    """
    metric = find_kind(kind).metric(name)
    array = np.asarray(rows, dtype=np.float64)
    error = float(resampled(metric, array).std(ddof=1))
    return {"metric": metric.label, "value": metric.of(array), "standard_error": error, "n": len(array)}


def compare_examples(dense: ExampleScore, pruned: ExampleScore, *, confidence: float = 0.95) -> SentenceComparison:
    """Compare two models on the same examples: the drop, and how sure it is.

    The standard error of the drop is that of 1,000 bootstrap samples of examples, the same for both models (Efron
    1979). Interval, bound and test take the drop as normally distributed; interval and bound allow for examples that
    were not seen, see :meth:`SentenceComparison.of`.

    Args:
        dense: Result of the dense model.
        pruned: Result of the pruned model on the same data.
        confidence: Of the two-sided interval and of the one-sided bound, between 0 and 1.

    Raises:
        ConfigError: If ``confidence`` is not between 0 and 1.
        DataError: If the two are not on the same data, or not by the same metric.
    """
    check_confidence(confidence)
    for field in ("kind", "metric", "n", "data_fingerprint"):
        if (a := getattr(dense, field)) != (b := getattr(pruned, field)):
            raise DataError(f"the results differ in {field} ({a} and {b}): expected the same metric on the same data")
    metric = find_kind(dense.kind).metric(dense.name)
    samples = [resampled(metric, np.asarray(score.kept)) for score in (dense, pruned)]
    error = 100 * float((samples[0] - samples[1]).std(ddof=1))
    divergence = saved_divergence(
        dense.distributions, pruned.distributions, labels=find_kind(dense.kind).several_labels, confidence=confidence
    )
    at_stake = 100.0 if metric.is_bounded else 0.0
    doubt = example_doubt(dense, confidence)
    return SentenceComparison.of(dense, pruned, error, confidence, doubt, divergence, at_stake)


def example_doubt(dense: ExampleScore, confidence: float = 0.95) -> str:
    """Why a drop from a score says nothing about what pruning costs; empty if it does.

    A model that does not do the task has nothing to lose: one that is not better than the best answer that looks at
    nothing, such as the commonest class, or where that scores nothing, whose score is not above 0.

    Args:
        dense: The score of the dense model.
        confidence: How sure it must be that it is, between 0 and 1.
    """
    kind, rows = find_kind(dense.kind), np.asarray(dense.kept, dtype=np.float64)
    metric = kind.metric(dense.name)
    if not metric.is_bounded:
        return ""
    best = max(kind.guesses(rows), key=metric.of, default=None) if len(rows) else None
    guessed, error = 0.0, dense.standard_error
    if best is not None:
        guessed = metric.of(best)
        error = math.hypot(float((resampled(metric, rows) - resampled(metric, best)).std(ddof=1)), 1 / (dense.n + 2))
    if dense.value - guessed > NormalDist().inv_cdf(confidence) * error:
        return ""
    least = "0" if best is None else f"{guessed:.4f}, which one answer for all of them has"
    return (
        f"the dense model has {dense.metric} {dense.value:.4f} ± {dense.standard_error:.4f} (n = {dense.n:,}), which "
        f"is not shown to be above {least}, so a drop says nothing; check that the labels are the model's, or score "
        f"more"
    )
