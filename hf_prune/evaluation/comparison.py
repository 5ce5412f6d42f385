"""Whether a pruned model is less accurate than the dense one.

Both models are scored on the same examples, so the comparison is paired: only examples that one of them gets right and
the other one wrong count, and the error of the difference is usually much smaller than the errors of the two
accuracies suggest.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from hf_prune.errors import DataError
from hf_prune.evaluation.accuracy_result import Evaluation
from hf_prune.evaluation.divergence import Divergence, saved_divergence
from hf_prune.evaluation.statistics import check_confidence
from hf_prune.utils.results import Result


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """A pruned model compared with the dense one on the same examples.

    Attributes:
        dense_accuracy: 0 to 1.
        pruned_accuracy: 0 to 1.
        drop: Percentage points lost, ``100 (dense - pruned)``; positive if the pruned model is worse.
        drop_standard_error: Of the drop, paired, in points.
        interval: Two-sided confidence interval of the drop, in points.
        upper_bound: One-sided upper confidence bound of the drop, in points: the pruned model is not
            worse by more than this.
        only_dense_right: Examples that only the dense model gets right.
        only_pruned_right: Examples that only the pruned model gets right.
        p_value: Of McNemar's exact two-sided test that both are equally accurate.
        n: Number of examples.
        confidence: Of the interval and of the bound, 0 to 1.
        doubt: Why the drop means nothing, in words; empty if it does. See :func:`reason_to_doubt`.
        divergence: How far the predictions are from the dense model's; None if a score does not have them.
    """

    bars = ("dense_accuracy", "pruned_accuracy")

    dense_accuracy: float
    pruned_accuracy: float
    drop: float
    drop_standard_error: float
    interval: tuple[float, float]
    upper_bound: float
    only_dense_right: int
    only_pruned_right: int
    p_value: float
    n: int
    confidence: float
    doubt: str = ""
    divergence: Divergence | None = None

    def __str__(self) -> str:
        """One line: both accuracies, the drop with interval and bound, the test, and n; a doubt comes first.

        A second line has the divergence of the predictions.
        """
        low, high = self.interval
        level = f"{100 * self.confidence:g} %"
        warning = f"Warning: {self.doubt}.\n" if self.doubt else ""
        moved = "" if self.divergence is None else f"\npredictions: {self.divergence.summary()}"
        return (
            f"{warning}accuracy {100 * self.dense_accuracy:.2f} % -> {100 * self.pruned_accuracy:.2f} %: "
            f"drop {self.drop:.2f} points ({level} interval {low:.2f} to {high:.2f}, one-sided upper bound "
            f"{self.upper_bound:.2f}; {self.only_dense_right} only dense right, {self.only_pruned_right} only pruned "
            f"right, McNemar p = {self.p_value:.3g}, n = {self.n}){moved}"
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "interval": list(self.interval)}


def compare(dense: Evaluation, pruned: Evaluation, *, confidence: float = 0.95) -> Comparison:
    """Compare two models on the same examples: the drop in accuracy, and how sure it is.

    The interval and the bound are Wald's after adding 0.5 to each cell of the 2 x 2 table of right and
    wrong (Agresti & Min, "Simple improved confidence intervals for comparing matched proportions",
    Statistics in Medicine 24, 2005), which keeps their coverage close to nominal in small samples. The
    p-value is the exact binomial form of the test of McNemar ("Note on the sampling error of the
    difference between correlated proportions or percentages", Psychometrika 12, 1947).

    Args:
        dense: Result of the dense model.
        pruned: Result of the pruned model on the same data.
        confidence: Of the two-sided interval and of the one-sided bound, between 0 and 1.

    Returns:
        The drop in percentage points, its interval and bound, and the test.

    Raises:
        ConfigError: If ``confidence`` is not between 0 and 1.
        DataError: If the two are not on the same examples.

    Example:
        >>> print(compare(dense, pruned))  # doctest: +SKIP
        accuracy 90.48 % -> 89.91 %: drop 0.57 points (95 % interval -0.52 to 1.66, ...
    """
    check_confidence(confidence)
    _check_paired(dense, pruned)
    n = dense.n
    pairs = [(a == y, b == y) for a, b, y in zip(dense.predictions, pruned.predictions, dense.labels, strict=True)]
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    _, standard_error = _paired_drop(lost, won, n)
    interval, upper_bound = interval_of(lost, won, n, confidence)
    return Comparison(
        dense_accuracy=dense.accuracy,
        pruned_accuracy=pruned.accuracy,
        drop=100 * (lost - won) / n,
        drop_standard_error=100 * standard_error,
        interval=interval,
        upper_bound=upper_bound,
        only_dense_right=lost,
        only_pruned_right=won,
        p_value=mcnemar(lost, won),
        n=n,
        confidence=confidence,
        doubt=reason_to_doubt(dense, confidence),
        divergence=saved_divergence(dense.distributions, pruned.distributions, confidence=confidence),
    )


def interval_of(lost: int, won: int, n: int, confidence: float) -> tuple[tuple[float, float], float]:
    """The two-sided interval of a drop and its one-sided upper bound, in points, see :func:`compare`.

    Args:
        lost: Examples that only the dense model gets right.
        won: Examples that only the pruned model gets right.
        n: All examples.
        confidence: Between 0 and 1.
    """
    adjusted, error = _paired_drop(lost + 0.5, won + 0.5, n + 2)
    two_sided = NormalDist().inv_cdf((1 + confidence) / 2) * error
    one_sided = NormalDist().inv_cdf(confidence) * error
    interval = 100 * max(-1.0, adjusted - two_sided), 100 * min(1.0, adjusted + two_sided)
    return interval, 100 * min(1.0, adjusted + one_sided)


def reason_to_doubt(dense: Evaluation, confidence: float = 0.95) -> str:
    """Why a drop from a score says nothing about what pruning costs; empty if it does.

    A model that does not do the task has nothing to lose. That is the case if its classes are not those of the data, or
    if it is not significantly better than always answering with the most frequent class (McNemar's exact test,
    one-sided, on the same examples), for example with reversed labels.

    Args:
        dense: The score of the dense model.
        confidence: How sure it must be that the model is better, between 0 and 1.

    Example:
        >>> reason_to_doubt(dense)  # doctest: +SKIP
        'the dense model is right on 8.50 % of the examples, and always answering class 1 on 52.00 %: ...'
    """
    if dense.classes:
        return f"the classes differ, so the accuracy says little: {dense.classes}; check label names and their order"
    counts = Counter(dense.labels)
    common = min(counts, key=lambda label: (-counts[label], label))
    pairs = list(zip(dense.predictions, dense.labels, strict=True))
    won = sum(guess == label != common for guess, label in pairs)
    lost = sum(guess != label == common for guess, label in pairs)
    p_value = _tail(lost, won + lost)
    if p_value <= 1 - confidence:
        return ""
    return (
        f"the dense model is right on {100 * dense.accuracy:.2f} % of the examples, and always answering class "
        f"{common} on {100 * counts[common] / dense.n:.2f} % (n = {dense.n:,}): it is not shown to be better "
        f"(p = {p_value:.2g}), so a drop says nothing; check that the labels are those of this model, or score more "
        f"examples"
    )


def _check_paired(dense: Evaluation, pruned: Evaluation) -> None:
    if dense.n != pruned.n:
        raise DataError(f"the dense result has {dense.n} examples, the pruned one {pruned.n}: use the same data")
    if dense.data_fingerprint != pruned.data_fingerprint:
        raise DataError(
            f"the results are on different data (fingerprints {dense.data_fingerprint} and "
            f"{pruned.data_fingerprint}): evaluate both models on the same examples in the same order"
        )
    if dense.labels != pruned.labels:
        raise DataError("the results have different labels: give both models the same label2id and evaluate again")


def _paired_drop(lost: float, won: float, n: float) -> tuple[float, float]:
    """Difference of two paired proportions and its standard error, from the discordant counts."""
    return (lost - won) / n, math.sqrt((lost + won) - (lost - won) ** 2 / n) / n


def mcnemar(lost: int, won: int) -> float:
    """P-value of the exact two-sided test: ``min(lost, won)`` heads or fewer in fair tosses, doubled."""
    return min(1.0, 2 * _tail(min(lost, won), lost + won))


def _tail(most: int, tosses: int) -> float:
    """Probability of ``most`` heads or fewer in fair tosses."""
    term = tail = 1  # binomial coefficients, as exact integers
    for heads in range(most):
        term = term * (tosses - heads) // (heads + 1)
        tail += term
    return tail / 2**tosses
