"""ALPS: the mask and the weights of a layer found together, by operator splitting."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_prune.criteria.base import Criterion, Select, WeightStats
from hf_prune.criteria.registry import CRITERIA
from hf_prune.kernels.least_squares import damped, layer_error, least_squares

_ITERATIONS = 300
_EVERY = 3  # iterations between two looks at the support
_PENALTY = 0.1
_LEAST_PENALTY = 1e-5
_SETTLED = (30, 3e-4)  # enough, once that many iterations change less than that share of the support
_SOLVE = 10  # iterations of conjugate gradients: they begin close to the solution
_CLOSE = 1.5  # times the error: magnitude within that is solved to the end
_NO_INPUT = 1e-12


@CRITERIA.register("alps")
class ALPS(Criterion):
    """Minimise the change of the layer's outputs subject to the number of non-zeros.

    ADMM alternates between a ridge regression without the constraint and the projection onto it, under a penalty
    that grows until the support stands still; conjugate gradients then solve for the weights on that support. Small
    layers with few good masks can lead it astray: if the largest weights with least squares change the outputs less,
    they are taken instead.
    """

    name = "alps"
    description = "mask and weights of a layer by ADMM: calibrated, without gradients; the most accurate, slower"
    paper = "Meng et al. 2024, arXiv:2406.07831"
    needs = frozenset({"input_gram"})
    scopes = frozenset({"row", "layer"})
    repairs = True

    def scores(self, weight: Tensor, stats: WeightStats) -> Tensor:
        """Size in units of the input, where the iterations start; see :meth:`Criterion.scores`."""
        assert stats.input_gram is not None
        return weight.float().abs() * stats.input_gram.diagonal().sqrt().clamp_min(_NO_INPUT)

    def prune_weight(self, weight: Tensor, stats: WeightStats, select: Select) -> tuple[Tensor, Tensor]:
        """See :meth:`Criterion.prune_weight`."""
        assert stats.input_gram is not None
        gram = damped(stats.input_gram.to(torch.promote_types(weight.dtype, torch.float32)))
        dense = weight.to(gram.dtype)
        size = gram.diagonal().sqrt()
        seen = dense.masked_fill(stats.input_gram.diagonal() == 0, 0)  # weights without an input go first
        keep, free = _support(seen * size, gram / torch.outer(size, size), select)
        new = least_squares(dense, keep, gram, start=free / size, iterations=_SOLVE)
        keep, new = _or_magnitude(dense, keep, new, gram, stats.input_gram.to(gram.dtype), select)
        return keep, new.to(weight.dtype)


def _or_magnitude(
    dense: Tensor, keep: Tensor, new: Tensor, gram: Tensor, plain: Tensor, select: Select
) -> tuple[Tensor, Tensor]:
    """A mask and its weights, or those of magnitude and least squares if their layer error is smaller.

    Args:
        dense: (out, in) dense weights.
        keep: (out, in) bool.
        new: (out, in) weights on it.
        gram: (in, in) damped Gram matrix.
        plain: (in, in) Gram matrix without damping, which the error is measured by.
        select: Chooses the largest.
    """
    largest = select(dense.float().abs())
    error = layer_error(dense, new, plain)
    solved = least_squares(dense, largest, gram, iterations=_SOLVE)
    if layer_error(dense, solved, plain) > _CLOSE * error:
        return keep, new
    solved = least_squares(dense, largest, gram)
    return (largest, solved) if layer_error(dense, solved, plain) < error else (keep, new)


def _support(dense: Tensor, gram: Tensor, select: Select) -> tuple[Tensor, Tensor]:
    """The support that ADMM settles on, and its last weights before the projection onto it.

    Args:
        dense: (out, in) weights in units of their inputs.
        gram: (in, in) Gram matrix with ones on its diagonal.
        select: Chooses the largest.
    """
    keep = select(dense.float() ** 2)
    values, vectors = torch.linalg.eigh(gram)
    image = dense @ gram
    penalty, grown = _PENALTY, False
    sparse, dual = dense * keep, torch.zeros_like(dense)
    seen = keep
    for iteration in range(1, _ITERATIONS + 1):
        free = _ridge(image - dual + penalty * sparse, values, vectors, penalty)
        wish = free + dual / penalty
        keep = select(wish.float() ** 2)
        sparse = wish * keep
        dual = dual + penalty * (free - sparse)
        if iteration % _EVERY:
            continue
        changed = int((keep ^ seen).sum()) / max(1, int(keep.sum()))
        seen = keep
        if changed > 0.1:
            penalty, grown = penalty * 1.3, True
        elif changed > 0.005:
            penalty, grown = penalty * 1.2, True
        elif grown:
            if changed == 0 or (iteration >= _SETTLED[0] and changed < _SETTLED[1]):
                break
            penalty *= 1.1
        else:  # too stiff for anything to move: loosen it
            penalty /= 5
            if penalty < _LEAST_PENALTY:
                break
            if changed:
                seen = keep = select(dense.float() ** 2)
                sparse, dual = dense * keep, torch.zeros_like(dense)
    return keep, free


def _ridge(target: Tensor, values: Tensor, vectors: Tensor, penalty: float) -> Tensor:
    """``target @ inverse(gram + penalty)`` from the eigenvalues and eigenvectors of the Gram matrix."""
    if len(target) > len(values):
        return target @ ((vectors / (values + penalty)) @ vectors.t())
    return ((target @ vectors) / (values + penalty)) @ vectors.t()
