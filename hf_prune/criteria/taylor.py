"""Taylor: how much the loss changes, to first order, when a weight is removed."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_prune.criteria.base import Criterion, UnitRanking, WeightStats
from hf_prune.criteria.registry import CRITERIA


@CRITERIA.register("taylor")
class Taylor(Criterion):
    """Score |w · g|, averaged over calibration batches."""

    name = "taylor"
    description = "|w · gradient|, averaged over labelled batches: keeps what the loss depends on"
    paper = "Molchanov et al. 2017, arXiv:1611.06440"
    units = UnitRanking("texts", "absolute gradients of gates", "Molchanov et al. 2019, arXiv:1906.10771")
    needs = frozenset({"absolute_gradient"})

    def scores(self, weight: Tensor, stats: WeightStats) -> Tensor:
        """|w| · mean |g|, see :meth:`Criterion.scores`."""
        assert stats.absolute_gradient is not None
        return torch.mul(weight.float(), stats.absolute_gradient).abs_()
