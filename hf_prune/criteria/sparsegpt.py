"""SparseGPT: remove weights column by column, and update the columns that follow to make up for it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_prune.criteria.base import Criterion, Select, WeightStats
from hf_prune.criteria.registry import CRITERIA
from hf_prune.kernels.least_squares import damped, inverse_factor_

_BLOCK = 128  # columns whose mask is chosen together, as in the paper
_NO_INPUT = 1e-12


@CRITERIA.register("sparsegpt")
class SparseGPT(Criterion):
    """Optimal-brain-surgeon updates along the columns, with masks that follow them.

    With U the upper Cholesky factor of the inverse Gram matrix, removing weight j of an output costs ``w²/U_jj²``
    once the columns before j are fixed. Masks are chosen for 128 columns at a time, or for every M columns of N:M, on
    the weights as the updates from earlier columns have left them.
    """

    name = "sparsegpt"
    description = "second-order updates of what stays, column by column: calibrated, without gradients"
    paper = "Frantar and Alistarh 2023, arXiv:2301.00774"
    needs = frozenset({"input_gram"})
    scopes = frozenset({"row", "layer"})
    repairs = True

    def scores(self, weight: Tensor, stats: WeightStats) -> Tensor:
        """The cost of each weight before any column is fixed; see :meth:`Criterion.scores`."""
        assert stats.input_gram is not None
        return (weight.float() ** 2 * _removal_cost(stats.input_gram, _inverse_factor(stats.input_gram))).float()

    def prune_weight(self, weight: Tensor, stats: WeightStats, select: Select) -> tuple[Tensor, Tensor]:
        """See :meth:`Criterion.prune_weight`."""
        assert stats.input_gram is not None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        upper = _inverse_factor(stats.input_gram)
        cost = _removal_cost(stats.input_gram, upper).to(dtype)
        upper = upper.to(dtype)
        # Transposed, so that a column of weights is contiguous in memory.
        columns = weight.t().to(dtype, memory_format=torch.contiguous_format, copy=True)  # (in, out)
        keep = torch.ones_like(columns, dtype=torch.bool)
        width = select.width * max(1, _BLOCK // select.width)  # no unit lies in two blocks
        pool = select.width if select.pools else width
        # Updates inside a block are applied at once, since the next masks depend on them. Later blocks get all updates
        # of a block in one matrix product, which is much faster than one product per column.
        for start in range(0, len(columns), width):
            block = columns[start : start + width]  # (width, out), a view
            factor = upper[start : start + width, start : start + width]
            errors = torch.zeros_like(block)
            for j in range(len(block)):
                if j % pool == 0:
                    scores = (block[j : j + pool] ** 2 * cost[start + j : start + j + pool, None]).t().float()
                    keep[start + j : start + j + pool] = select.columns(scores, start + j).t()
                errors[j] = block[j].masked_fill(keep[start + j], 0) / factor[j, j]  # 0 for weights that stay
                block[j:].addr_(factor[j, j:], errors[j], alpha=-1)
            block.masked_fill_(~keep[start : start + width], 0)  # they are zero but for rounding
            columns[start + width :].addmm_(upper[start : start + width, start + width :].t(), errors, alpha=-1)
        return keep.t(), columns.t().to(weight.dtype)


def _inverse_factor(gram: Tensor) -> Tensor:
    """(in, in) upper Cholesky factor of the inverse of the damped Gram matrix, float64."""
    return inverse_factor_(damped(gram, dtype=torch.float64))


def _removal_cost(gram: Tensor, upper: Tensor) -> Tensor:
    """(in,) 1/U_jj², the cost per squared weight; next to nothing for inputs that are always zero."""
    return upper.diagonal() ** -2 * torch.where(gram.diagonal() > 0, 1.0, _NO_INPUT)
