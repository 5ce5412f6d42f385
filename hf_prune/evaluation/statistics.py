"""Standard errors of means, rank correlation, quantiles of Student's t, and the check of a confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hf_prune.errors import ConfigError

_MANY = 10_000  # degrees of freedom from which Student's t is as good as normal


def check_confidence(confidence: float) -> None:
    """Make sure that a confidence is one.

    Raises:
        ConfigError: If it is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence!r}: expected a number between 0 and 1, such as 0.95")


def standard_error_of(values: Sequence[float], weights: Sequence[int]) -> float | None:
    """Standard error of a weighted mean of independent values; None for one value.

    For equal weights it is s / sqrt(n).
    """
    n, total = len(values), sum(weights)
    if n < 2:
        return None
    mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total
    squares = math.fsum((w / total * (v - mean)) ** 2 for v, w in zip(values, weights, strict=True))
    return math.sqrt(n / (n - 1) * squares)


def standard_error_of_mean(values: Sequence[float]) -> float:
    """``s / sqrt(n)``; infinite for one value, which says nothing about others."""
    error = standard_error_of(values, [1] * len(values))
    return math.inf if error is None else error


def spearman(values: Any, references: Any) -> float:
    """Spearman's rank correlation, -1 to 1; 0 where either orders nothing, since all of it is equal."""
    from scipy.stats import spearmanr

    if len(set(values)) < 2 or len(set(references)) < 2:
        return 0.0
    return float(spearmanr(values, references).statistic)


def student_t(confidence: float, degrees: int) -> float:
    """The two-sided quantile of Student's t: within how many standard errors it lies with this confidence.

    From the finite series of its distribution for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and
    26.7.4), by bisection.

    Args:
        confidence: Two-sided, between 0 and 1.
        degrees: Degrees of freedom, at least 1; from 10,000 on, the normal distribution is used.

    Example:
        >>> f"{student_t(0.95, 1):.3f} {student_t(0.95, 10):.3f} {student_t(0.95, 20000):.3f}"
        '12.706 2.228 1.960'
    """
    if degrees >= _MANY:
        from statistics import NormalDist

        return NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """Probability that |t| is at most sqrt(degrees) * tan(angle)."""
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    series = 0.0
    for k in range(1 + odd, degrees, 2):
        series += term
        term *= square * k / (k + 1)
    return 2 / math.pi * (angle + sine * series) if odd else sine * series
