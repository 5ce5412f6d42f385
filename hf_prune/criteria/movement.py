"""Movement: remove the weights that a training moves towards zero, however large they are."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hf_prune.criteria.base import TRAINED, Criterion, UnitRanking, WeightStats
from hf_prune.criteria.registry import CRITERIA


@CRITERIA.register("movement")
class Movement(Criterion):
    """Score -sum(w * g) over the steps of a training, with straight-through gradients of removed weights."""

    name = "movement"
    description = "-w · gradient, summed over a training: keeps what moves away from zero"
    paper = "Sanh et al. 2020, arXiv:2005.07683"
    units: ClassVar[UnitRanking | None] = UnitRanking(
        "a training", "how far weights moved from zero", "Lagunas et al. 2021, arXiv:2109.04838"
    )
    needs = TRAINED

    def scores(self, weight: Tensor, stats: WeightStats) -> Tensor:
        """The score that the training has gathered, see :meth:`Criterion.scores`."""
        assert stats.training_score is not None
        return stats.training_score


@CRITERIA.register("soft_movement")
class SoftMovement(Movement):
    """The same scores under a steady pull downwards; weights whose score falls below a threshold go, in any tensor."""

    name = "soft_movement"
    description = "movement with a threshold in place of a count, until the schedule ends"
    scopes = frozenset({"global"})
    units = None  # a threshold fixes no number of units
