"""Random: the baseline that every other criterion has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_prune.criteria.base import Criterion, UnitRanking, WeightStats
from hf_prune.criteria.registry import CRITERIA


@CRITERIA.register("random")
class Random(Criterion):
    """Score every weight by a seeded random number."""

    name = "random"
    description = "uniform random scores from the seed: the baseline to beat"
    paper = "Blalock et al. 2020, arXiv:2003.03033"
    units = UnitRanking("no data", "random numbers", "a baseline")
    rowwise = False  # one stream of numbers for the whole weight

    def scores(self, weight: Tensor, stats: WeightStats) -> Tensor:
        """Uniform in (0, 1], zero for weights that are zero; see :meth:`Criterion.scores`.

        Drawn on the CPU, so that a seed means the same masks on every device.
        """
        generator = torch.Generator().manual_seed(stats.seed)
        noise = torch.rand(weight.shape, generator=generator).neg_().add_(1)  # in place: a second copy may not fit
        return noise.to(weight.device).mul_(weight != 0)
