"""Block Fisher: optimal brain surgeon with the Fisher matrix of neighbouring weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_prune.criteria.base import Criterion, UnitRanking, WeightStats
from hf_prune.criteria.registry import CRITERIA

_DAMPING = 0.01  # of the mean diagonal of each block
_MIN_DAMPING = 1e-24
_CHUNK = 1 << 21  # elements of the blocks that are inverted together, 16 MiB in float64


@CRITERIA.register("fisher")
class Fisher(Criterion):
    """Remove the units whose loss the other weights of their block can best make up for.

    With H a block of the damped Fisher matrix, the loss grows by ``δᵀHδ / 2`` when the weights of the block change by
    δ. If the others adapt, removing the weights Q costs ``w_Qᵀ ([H⁻¹]_QQ)⁻¹ w_Q / 2``: the score of a unit, summed over
    its outputs. Once the mask is known, the weights that stay take the values that minimise the growth for everything
    removed from the block together. For N:M the units are single weights.

    The Fisher matrix is that of the model's own predictions for single examples; labels in the batches are ignored. A
    classifier has next to no gradients left on the labels of sentences that it was fine-tuned on.
    """

    name = "fisher"
    description = "optimal brain surgeon on blocks of the Fisher matrix, updates what stays: no labels needed"
    paper = "Kurtic et al. 2022, arXiv:2203.07259"
    units = UnitRanking(
        "texts",
        "squared gradients of gates; before a repair, times the share that other units cannot make up for",
        "Kwon et al. 2022, arXiv:2204.09656",
    )
    needs = frozenset({"fisher"})
    repairs = True

    def scores(self, weight: Tensor, stats: WeightStats) -> Tensor:
        """See :meth:`Criterion.scores`; the cost of a unit is the sum over its weights."""
        assert stats.fisher is not None
        parts = []
        for fisher, (w,) in _chunks(stats.fisher, weight):
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(fisher)))
            parts.append(0.5 * w * _dual(w, inverse, stats.columns))
        return _joined(parts, weight).float()

    def update(self, weight: Tensor, keep: Tensor, stats: WeightStats) -> Tensor:
        """See :meth:`Criterion.update`."""
        assert stats.fisher is not None
        parts = []
        for fisher, (w, kept) in _chunks(stats.fisher, weight, keep):
            hessian = _damped(fisher)
            # The change c of the weights K that stay minimises the growth for the removed weights Q: H_KK c = H_KQ w_Q.
            # Masks differ, so that H_KK has a size of its own in every block; with the identity in the place of removed
            # weights, all blocks are solved together.
            pull = hessian @ (w * (1 - kept)).unsqueeze(-1)  # (outputs, blocks, size, 1)
            hessian = hessian * kept.unsqueeze(-1) * kept.unsqueeze(-2)
            hessian.diagonal(dim1=-2, dim2=-1).add_(1 - kept)
            change = torch.cholesky_solve(pull * kept.unsqueeze(-1), torch.linalg.cholesky(hessian)).squeeze(-1)
            parts.append((w + change) * kept)
        return _joined(parts, weight).to(weight.dtype)


def _chunks(fisher: Tensor, *matrices: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """A few outputs at a time, float64: (outputs, blocks, size, size), and matrices as (outputs, blocks, size)."""
    _, blocks, size, _ = fisher.shape
    step = max(1, _CHUNK // (blocks * size * size))
    padding = blocks * size - matrices[0].shape[1]
    for start in range(0, len(fisher), step):
        rows = slice(start, start + step)
        padded = [torch.nn.functional.pad(matrix[rows].double(), (0, padding)) for matrix in matrices]
        yield fisher[rows].double(), [matrix.reshape(-1, blocks, size) for matrix in padded]


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    """The inverse of :func:`_chunks` for one matrix."""
    return torch.cat(parts).flatten(1)[:, : like.shape[1]]  # (out, blocks * size) -> (out, in)


def _damped(fisher: Tensor) -> Tensor:
    """Add 1 % of the mean diagonal of each block to its diagonal, so that it can be inverted."""
    mean = fisher.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)  # (outputs, blocks, 1)
    return fisher + torch.diag_embed((_DAMPING * mean).clamp_min(_MIN_DAMPING).expand(*fisher.shape[:3]))


def _dual(weight: Tensor, inverse: Tensor, columns: int) -> Tensor:
    """``([H⁻¹]_QQ)⁻¹ w_Q`` for each unit Q of ``columns`` neighbours: (outputs, blocks, size), as the weight is."""
    if columns == 1:
        return weight / inverse.diagonal(dim1=-2, dim2=-1)
    units = inverse.unflatten(-1, (-1, columns)).unflatten(-3, (-1, columns))  # (…, units, columns, units, columns)
    units = units.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # (…, units, columns, columns)
    values = weight.unflatten(-1, (-1, columns)).unsqueeze(-1)  # (…, units, columns, 1)
    return torch.cholesky_solve(values, torch.linalg.cholesky(units)).flatten(-3)
