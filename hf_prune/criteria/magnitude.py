"""Magnitude: keep the largest weights."""

from __future__ import annotations

from torch import Tensor

from hf_prune.criteria.base import Criterion, UnitRanking, WeightStats
from hf_prune.criteria.registry import CRITERIA


@CRITERIA.register("magnitude")
class Magnitude(Criterion):
    """Score |w|, the L1 norm of the unit."""

    name = "magnitude"
    description = "|w|: keeps the largest weights; needs no data"
    paper = "Han et al. 2015, arXiv:1506.02626"
    units = UnitRanking("no data", "sum of squared weights", "Li et al. 2017, arXiv:1608.08710")

    def scores(self, weight: Tensor, stats: WeightStats) -> Tensor:
        """|w|, see :meth:`Criterion.scores`."""
        return weight.float().abs()
