"""Diagonal Fisher: how much the loss grows, to second order, when a weight is removed and the others do not change."""

from __future__ import annotations

from torch import Tensor

from hf_prune.criteria.base import Criterion, WeightStats
from hf_prune.criteria.registry import CRITERIA

_NO_GRADIENT = 1e-24  # weights without a gradient rank below the others, and among themselves by magnitude


@CRITERIA.register("fisher_diagonal")
class FisherDiagonal(Criterion):
    """Score w² F / 2 with F the mean squared gradient: optimal brain damage with the Fisher matrix.

    The gradients are those of the model's own predictions for single examples; labels in the batches are ignored.
    """

    name = "fisher_diagonal"
    description = "w² · mean squared gradient of the model's own predictions, one example at a time: no labels needed"
    paper = "LeCun et al. 1990, Theis et al. 2018, arXiv:1801.05787"
    needs = frozenset({"squared_gradient"})

    def scores(self, weight: Tensor, stats: WeightStats) -> Tensor:
        """See :meth:`Criterion.scores`."""
        assert stats.squared_gradient is not None
        return weight.float() ** 2 * (0.5 * stats.squared_gradient).clamp_min(_NO_GRADIENT)
