"""How far the predictions of a pruned model are from those of the dense one: a finer ruler than any score.

A score counts only answers that become right or wrong, and of these the ones that cancel out are lost. The divergence
of the predicted distributions sees every change, of every example, so that fewer examples tell two methods apart.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from hf_prune.errors import DataError
from hf_prune.evaluation.statistics import check_confidence
from hf_prune.utils.results import Result

IMPOSSIBLE = -1e4  # the log-probability of a class whose logit is minus infinity
MOST_STORED = 200_000  # numbers of distributions that the file of a score holds: about 1.1 MB
_UNLIKELY = 1e-3  # by how much stored probabilities may miss a sum of 1


@dataclass(frozen=True, repr=False)
class Divergence(Result):
    """How far the predictions of a pruned model are from those of the dense one, on the same examples.

    Attributes:
        kl: Mean Kullback-Leibler divergence of the pruned model's distribution from the dense model's, in nats; over
            several labels at once, their sum. 0 where nothing changed.
        kl_standard_error: Of ``kl``, from the variance between examples.
        flips: Percent of the examples whose answer changed, whether it is right or not.
        flips_standard_error: Of ``flips``, binomial, in points of percent.
        flips_upper_bound: One-sided upper confidence bound of ``flips`` (Wilson 1927).
        n: Number of examples.
        confidence: Of the bound, 0 to 1.
    """

    bars = ("kl", "flips")

    kl: float
    kl_standard_error: float
    flips: float
    flips_standard_error: float
    flips_upper_bound: float
    n: int
    confidence: float

    def __str__(self) -> str:
        """One line: the divergence and the share of changed answers, with their standard errors, and n."""
        return f"{self.summary()} (n = {self.n:,})"

    def summary(self) -> str:
        """The line without n."""
        return (
            f"KL {self.kl:.4f} ± {self.kl_standard_error:.4f} nats, "
            f"{self.flips:.2f} % ± {self.flips_standard_error:.2f} of the answers changed"
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def divergence_of(dense: Any, pruned: Any, *, labels: bool = False, confidence: float = 0.95) -> Divergence:
    """Compare what two models predict for the same examples.

    Args:
        dense: (n, classes) log-probabilities of the dense model; with ``labels``, (n, labels) logits.
        pruned: The same of the pruned model.
        labels: Whether each column is a label of its own, present or not, rather than one class of several.
        confidence: Of the bound on the flips, between 0 and 1.

    Raises:
        ConfigError: If ``confidence`` is not between 0 and 1.
        DataError: If the two have different shapes, there are no examples, or a number cannot be a prediction.

    Example:
        >>> same, other = np.log([[0.9, 0.1]]), np.log([[0.4, 0.6]])
        >>> found = divergence_of(same, other)
        >>> f"{found.kl:.3f} {found.flips:.0f}"
        '0.551 100'
    """
    check_confidence(confidence)
    a, b = (np.asarray(rows, dtype=np.float64) for rows in (dense, pruned))
    if a.shape != b.shape:
        raise DataError(f"the predictions have the shapes {a.shape} and {b.shape}: expected those of the same examples")
    if a.ndim != 2 or not a.size:
        raise DataError(f"the predictions have the shape {a.shape}: expected a row for each of one or more examples")
    a, b = (_possible(rows, name, labels) for rows, name in ((a, "dense"), (b, "pruned")))
    changed = ((a > 0) != (b > 0)).any(1) if labels else a.argmax(1) != b.argmax(1)
    values, n = (_kl_of_labels(a, b) if labels else _kl_of_classes(a, b)), len(a)
    error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    return _divergence(float(values.mean()), error, int(changed.sum()), n, confidence)


def _divergence(kl: float, error: float, changed: int, n: int, confidence: float) -> Divergence:
    share = changed / n
    return Divergence(
        kl=kl,
        kl_standard_error=error,
        flips=100 * share,
        flips_standard_error=100 * math.sqrt(share * (1 - share) / n),
        flips_upper_bound=100 * upper_bound_of_share(share, n, confidence),
        n=n,
        confidence=confidence,
    )


def _possible(rows: Any, name: str, labels: bool) -> Any:
    """Predictions without infinities, which are next to certain instead.

    Raises:
        DataError: If a row has NaN, or can be no logarithms of probabilities.
    """
    broken = np.isnan(rows).any(1)
    if not labels:
        broken |= np.isposinf(rows).any(1) | np.isneginf(rows).all(1)
    if broken.any():
        expected = "logits" if labels else "log-probabilities"
        raise DataError(
            f"the predictions of the {name} model are NaN, or no {expected}, for {int(broken.sum()):,} of "
            f"{len(rows):,} examples: its weights are damaged, or its dtype overflows"
        )
    return rows.clip(IMPOSSIBLE, -IMPOSSIBLE if labels else None)


def kl_of_examples(dense: Any, pruned: Any) -> Any:
    """(n,) float64: the divergence of each example, from (n, classes) log-probabilities."""
    return _kl_of_classes(np.asarray(dense, dtype=np.float64), np.asarray(pruned, dtype=np.float64))


def upper_bound_of_share(share: float, n: int, confidence: float) -> float:
    """One-sided upper confidence bound of a share (Wilson, "Probable inference", JASA 22, 1927).

    Args:
        share: What was counted, 0 to 1.
        n: Of how many.
        confidence: Between 0 and 1.

    Example:
        >>> f"{upper_bound_of_share(0.0, 100, 0.95):.4f}"
        '0.0263'
    """
    z = NormalDist().inv_cdf(confidence)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return min(1.0, (share + z * z / (2 * n) + half) / (1 + z * z / n))


def pack_rows(rows: Any) -> tuple[str, ...]:
    """Rows of numbers as texts for JSON, one each: base64 of float32, little-endian.

    Args:
        rows: (n, columns).
    """
    array = np.ascontiguousarray(rows, dtype="<f4")
    return tuple(base64.b64encode(row.tobytes()).decode() for row in array)


def stored_rows(texts: Sequence[str]) -> list[str]:
    """The texts of :func:`pack_rows` that a file keeps: none where they hold more than ``MOST_STORED`` numbers."""
    width = len(base64.b64decode(texts[0])) // 4 if texts else 0
    return [] if len(texts) * width > MOST_STORED else list(texts)


def unpack_rows(texts: Sequence[str]) -> Any:
    """The inverse of :func:`pack_rows`.

    Returns:
        (n, columns) float64.

    Raises:
        DataError: If a text is not one of those, or the rows have different lengths.
    """
    try:
        rows = [np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4") for text in texts]
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError(f"a distribution is not base64 of float32 numbers: {error}; measure again") from error
    widths = {len(row) for row in rows}
    if len(widths) != 1 or 0 in widths or not all(np.isfinite(row).all() for row in rows):
        raise DataError(
            f"distributions have {sorted(widths)} numbers: expected as many in each, all finite; measure again"
        )
    return np.stack(rows).astype(np.float64)


def read_distributions(values: Mapping[str, Any], n: int, predictions: Sequence[float] | None) -> tuple[str, ...]:
    """The distributions that a saved score has, once they are seen to fit its predictions.

    Args:
        values: The score, as ``to_dict`` gave it.
        n: How many examples it has.
        predictions: The class that it says was predicted for each; None for several labels, which are not checked.

    Returns:
        The texts of :func:`pack_rows`; empty if the score has none, as those of earlier versions.

    Raises:
        DataError: If they do not fit.
    """
    texts = values.get("distributions") or ()
    if not isinstance(texts, list | tuple):
        raise DataError(f"distributions is {texts!r:.60}: expected a list of texts")
    if not texts:
        return ()
    rows = unpack_rows(texts)
    if len(rows) != n:
        raise DataError(f"there are {len(rows)} distributions of {n} examples: the file was edited; measure again")
    if predictions is not None:
        if np.abs(np.exp(rows).sum(1) - 1).max() > _UNLIKELY:
            raise DataError("probabilities of a distribution do not add up to 1: the file was edited; measure again")
        if not _are_largest(rows, predictions):
            raise DataError("predictions are not those of the distributions: the file was edited; measure again")
    return tuple(texts)


def saved_divergence(
    dense: Sequence[str], pruned: Sequence[str], *, labels: bool = False, confidence: float = 0.95
) -> Divergence | None:
    """:func:`divergence_of` what two scores saved; None if one of them has no distributions, or of other classes.

    Args:
        dense: As :func:`pack_rows` gave them.
        pruned: The same.
        labels: See :func:`divergence_of`.
        confidence: See :func:`divergence_of`.
    """
    if not dense or not pruned:
        return None
    a, b = unpack_rows(dense), unpack_rows(pruned)
    if a.shape[1] != b.shape[1]:  # models with other labels can be compared by what they get right
        return None
    return divergence_of(a, b, labels=labels, confidence=confidence)


def read_divergence(values: Mapping[str, Any], changed: int, n: int, confidence: float) -> Divergence:
    """A saved divergence whose distributions were too many for the file: ``kl`` as it says, the rest counted again.

    Args:
        values: As ``to_dict`` gave it.
        changed: How many answers changed.
        n: Number of examples.
        confidence: Of the bound, between 0 and 1.

    Raises:
        DataError: If ``kl`` or its standard error is no number of 0 or more.
    """
    for name in ("kl", "kl_standard_error"):
        if type(value := values.get(name)) not in (int, float) or not 0 <= value < math.inf:  # type: ignore[operator]
            raise DataError(f"{name} is {value!r:.60}: expected a number of 0 or more; measure again")
    return _divergence(float(values["kl"]), float(values["kl_standard_error"]), changed, n, confidence)


def _are_largest(rows: Any, predictions: Sequence[float]) -> bool:
    """Whether each prediction is the column with the largest number of its row, up to rounding to float32.

    Nearly equal logits have equal log-probabilities in float32, and then any of these classes may be the prediction.
    """
    if not all(0 <= p < rows.shape[1] and p == int(p) for p in predictions):
        return False
    largest = rows.max(1)
    said = rows[np.arange(len(rows)), np.asarray(predictions, dtype=np.int64)]
    return bool((said >= largest - np.spacing(np.abs(largest).astype(np.float32))).all())


def _kl_of_classes(dense: Any, pruned: Any) -> Any:
    """(n,) divergences of distributions, from (n, classes) log-probabilities, normalised up to rounding."""
    dense, pruned = map(_log_softmax, (dense, pruned))
    return np.maximum((np.exp(dense) * (dense - pruned)).sum(1), 0)


def _log_softmax(rows: Any) -> Any:
    shifted = rows - rows.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _kl_of_labels(dense: Any, pruned: Any) -> Any:
    """(n,) sums over labels of the divergences of being present, from (n, labels) logits."""
    total = np.zeros(len(dense))
    for sign in (1, -1):  # present, and absent
        a, b = (-np.logaddexp(0, -sign * rows) for rows in (dense, pruned))  # log of the probability
        total += (np.exp(a) * (a - b)).sum(1)
    return np.maximum(total, 0)
