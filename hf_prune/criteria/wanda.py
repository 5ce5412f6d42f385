"""Wanda: magnitude times the norm of the input."""

from __future__ import annotations

from torch import Tensor

from hf_prune.criteria.base import Criterion, WeightStats
from hf_prune.criteria.registry import CRITERIA

_NO_INPUT = 1e-12  # weights whose input is always zero rank below the others, and among themselves by magnitude


@CRITERIA.register("wanda")
class Wanda(Criterion):
    """Score ``|w_ij| * ||x_j||``; the paper compares within an output: scope "row"."""

    name = "wanda"
    description = "|w| times the norm of its input: calibrated, without gradients; scope row as in the paper"
    paper = "Sun et al. 2023, arXiv:2306.11695"
    needs = frozenset({"input_norm"})
    scopes = frozenset({"row", "layer"})

    def scores(self, weight: Tensor, stats: WeightStats) -> Tensor:
        """See :meth:`Criterion.scores`."""
        assert stats.input_norm is not None
        return weight.float().abs() * stats.input_norm.clamp_min(_NO_INPUT)
