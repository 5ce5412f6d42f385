"""SNIP: sensitivity of the loss to each connection, from one mini-batch."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_prune.criteria.base import Criterion, WeightStats
from hf_prune.criteria.registry import CRITERIA


@CRITERIA.register("snip")
class Snip(Criterion):
    """Score |w · g| with one gradient over all calibration examples."""

    name = "snip"
    description = "|w · gradient| of the mean loss over all labelled examples at once"
    paper = "Lee et al. 2019, arXiv:1810.02340"
    needs = frozenset({"gradient"})

    def scores(self, weight: Tensor, stats: WeightStats) -> Tensor:
        """|w · g|, see :meth:`Criterion.scores`."""
        assert stats.gradient is not None
        return torch.mul(weight.float(), stats.gradient).abs_()
