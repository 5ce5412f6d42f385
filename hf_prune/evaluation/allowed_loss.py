"""What a pruned model may lose: points of its score, or a share of answers that change."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_prune.errors import BudgetError, ConfigError, DataError
from hf_prune.evaluation.comparison import interval_of
from hf_prune.evaluation.divergence import upper_bound_of_share
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.traits import fixed_sparsity
from hf_prune.utils.wrapping import is_sentence_model


@dataclass(frozen=True)
class Loss:
    """What a pruned model lost against the dense one on the same data.

    Args:
        value: Points of the metric, per cent of changed answers, or per cent of perplexity.
        standard_error: Of it, paired.
        bound: With 95 % confidence it is at most this.
    """

    value: float
    standard_error: float
    bound: float


@dataclass(frozen=True)
class AllowedLoss:
    """The most that may be lost.

    Args:
        most: How much.
        flips: Whether that is percent of answers that change, and not points of the score.
    """

    most: float
    flips: bool = False

    @classmethod
    def of(cls, max_drop: float | None, max_flips: float | None, default: float | None = None) -> AllowedLoss:
        """From what a caller gave.

        Args:
            max_drop: Points of the score, or None.
            max_flips: Percent of the answers, or None.
            default: Points of the score where neither is given; None if one is needed.

        Raises:
            ConfigError: If both are given, or neither, or one is out of range.
        """
        if max_drop is not None and max_flips is not None:
            raise ConfigError(
                f"max_drop is {max_drop!r} and max_flips {max_flips!r}: expected one of them, since one decides"
            )
        name, value = ("max_flips", max_flips) if max_flips is not None else ("max_drop", max_drop)
        if value is None:
            value = default
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not 0 < float(value) < 100:  # type: ignore[arg-type]
            what = "points of the metric, or per cent of perplexity,"
            if name == "max_flips":
                what = "percent of the answers"
            raise ConfigError(f"{name} is {value!r}: expected {what} between 0 and 100, such as 1.0")
        return cls(float(value), name == "max_flips")  # type: ignore[arg-type]

    @property
    def unit(self) -> str:
        """What a loss is in, after a number."""
        return "% of the answers" if self.flips else "points"

    @property
    def text(self) -> str:
        """The most that may be lost, in words."""
        return f"{self.most:g} {self.unit}"

    def loss(self, comparison: Any) -> Loss:
        """What a comparison says was lost.

        Raises:
            DataError: If it does not know how many answers changed.
        """
        if not self.flips:
            return Loss(comparison.drop, comparison.drop_standard_error, comparison.upper_bound)
        moved = comparison.divergence
        if moved is None:
            raise DataError("nothing is known of the answers that changed: expected classes, or scores measured again")
        return Loss(moved.flips, moved.flips_standard_error, moved.flips_upper_bound)

    def allows(self, comparison: Any) -> bool:
        """Whether what was lost is within, with the confidence of the comparison."""
        return self.loss(comparison).bound <= self.most


def check_budget(config: PruningConfig, max_drop: float | None, max_flips: float | None = None) -> AllowedLoss:
    """Make sure that a sparsity can be searched for.

    Returns:
        What a sparsity may lose.

    Raises:
        ConfigError: If the budget is out of range, or the granularity fixes the sparsity.
    """
    allowed = AllowedLoss.of(max_drop, max_flips)
    if fixed_sparsity(config) is not None:
        name = "max_flips" if allowed.flips else "max_drop"
        raise ConfigError(
            f"{name} contradicts granularity={config.granularity!r}, which fixes the sparsity at "
            f"{config.sparsity:g}: there is nothing to search for; prune, and compare the result with the dense model"
        )
    return allowed


def check_size(n: int, allowed: AllowedLoss, confidence: float) -> None:
    """Make sure that there are enough examples to show a loss within the budget.

    The smallest possible bound is that of a model that changes no prediction.

    Args:
        n: How many are scored.
        allowed: The budget.
        confidence: Between 0 and 1.

    Raises:
        BudgetError: If there are too few.
    """
    least = upper_bound_of_share(0.0, n, confidence) if allowed.flips else interval_of(0, 0, n, confidence)[1] / 100
    if (bound := 100 * least) > allowed.most:
        asked = f"a drop of at most {allowed.most:g} points cannot be shown with {n:,} sentences"
        if allowed.flips:
            asked = f"a change of at most {allowed.most:g} % of the answers cannot be shown with {n:,} sentences"
        raise BudgetError(
            f"{asked}: even of an unchanged model it is only known to be at most {bound:.2f} {allowed.unit}; score "
            f"{math.ceil(n * bound / allowed.most):,} or more, or accept a larger one"
        )


def check_scored_by_accuracy(model: Any, allowed: AllowedLoss, evaluation: Mapping[str, Any]) -> None:
    """Refuse scores that the search does not know, before anything is scored.

    Args:
        model: The model.
        allowed: The budget.
        evaluation: Options of the evaluation.

    Raises:
        ConfigError: If the score is neither an accuracy nor a perplexity.
    """
    if "kind" in evaluation:
        other = f"kind={evaluation['kind']!r}"
    elif is_sentence_model(model):
        other = "models of sentence-transformers"
    else:
        return
    name, scores = ("max_flips", "accuracies") if allowed.flips else ("max_drop", "accuracies and perplexities")
    raise ConfigError(f"{name} is for {scores}, and not for {other}: use a sweep")
