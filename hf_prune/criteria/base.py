"""The interface of a criterion: statistics in, scores out."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

ANY_SCOPE = frozenset({"row", "layer", "global"})

#: What calibration can gather: the gradient of the mean loss, and the mean absolute gradient of the batches.
STATISTICS = frozenset({"gradient", "absolute_gradient"})

Select = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class WeightStats:
    """What is known of one weight besides its values; what a criterion does not need stays None.

    Args:
        seed: A seed of this weight's own, from the config's seed and the parameter's name.
        gradient: (out, in) gradient of the loss, averaged over all calibration examples, float32.
        absolute_gradient: (out, in) absolute gradient of each batch's loss, averaged over the examples, float32.
    """

    seed: int
    gradient: Tensor | None = None
    absolute_gradient: Tensor | None = None

    def rows(self, rows: slice) -> WeightStats:
        """The statistics of some outputs only."""
        parts = {name: value[rows] for name in STATISTICS if (value := getattr(self, name)) is not None}
        return dataclasses.replace(self, **parts)


class Criterion(ABC):
    """A score for every weight, larger = keep.

    An entry sets the class attributes and implements :meth:`scores`. It must be pure: the same inputs
    give the same scores, and none is changed. A weight that is already exactly zero must get the lowest
    score, since removing it costs nothing.

    Attributes:
        name: The registered name.
        description: One line for ``hf-prune list``.
        paper: Where it comes from.
        needs: The :class:`WeightStats` fields that it needs from calibration.
        scopes: The scopes in which its scores can be compared.
        rowwise: Whether the scores of an output depend on that output's weights and statistics alone, so that a
            few outputs can be scored at a time.
        repairs: Whether :meth:`prune_weight` changes weights that are kept; then it is called with whole matrices.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    scopes: ClassVar[frozenset[str]] = ANY_SCOPE
    rowwise: ClassVar[bool] = True
    repairs: ClassVar[bool] = False

    @abstractmethod
    def scores(self, weight: Tensor, stats: WeightStats) -> Tensor:
        """Score a weight.

        Args:
            weight: (out, in), of any floating-point dtype.
            stats: What calibration gathered for it.

        Returns:
            (out, in) float32, on the weight's device.
        """

    def prune_weight(self, weight: Tensor, stats: WeightStats, select: Select) -> tuple[Tensor, Tensor]:
        """Choose the mask of one weight, and repair what is kept where the criterion can.

        Args:
            weight: (out, in).
            stats: What calibration gathered for it.
            select: Turns (out, in) scores into an (out, in) bool mask, True = keep, with the exact count.

        Returns:
            The mask and the weight, both (out, in). The default scores, selects, and repairs nothing.
        """
        return select(self.scores(weight, stats)), weight
