"""ALPS: find the mask and the weights of a layer together, by operator splitting."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_prune.criteria.base import Criterion, Select, WeightStats
from hf_prune.criteria.registry import CRITERIA
from hf_prune.kernels.least_squares import cholesky_factor, damped, layer_error, least_squares

_ITERATIONS = 300
_CHECK_EVERY = 3  # iterations between two comparisons of the support
_PENALTY = 0.1
_MIN_PENALTY = 1e-5
_SETTLED_AFTER, _SETTLED_CHANGE = 30, 3e-4  # from so many iterations on, stop once less than this share changes
_SOLVE = 10  # iterations of conjugate gradients, which start close to the solution
_CLOSE = 1.5  # times the error of ADMM: only a magnitude mask within that is solved to the end
_SMALL = 1 << 16  # weights of a layer, up to which the largest of them are tried in place of what ADMM found
_NO_INPUT = 1e-12


@CRITERIA.register("alps")
class ALPS(Criterion):
    """Minimise the change of the layer's outputs subject to the number of non-zeros.

    ADMM alternates between a ridge regression without the constraint and the projection onto it, under a penalty that
    grows until the support no longer changes; conjugate gradients then solve for the weights on that support. In small
    layers with few good masks it can end in a bad one: if the largest weights, refitted by least squares, change the
    outputs less, they are taken instead.
    """

    name = "alps"
    description = "mask and weights of a layer by ADMM: calibrated, without gradients; the most accurate, slower"
    paper = "Meng et al. 2024, arXiv:2406.07831"
    needs = frozenset({"input_gram"})
    scopes = frozenset({"row", "layer"})
    repairs = True

    def scores(self, weight: Tensor, stats: WeightStats) -> Tensor:
        """|w| times the norm of its input, where the iterations start; see :meth:`Criterion.scores`."""
        assert stats.input_gram is not None
        return weight.float().abs() * stats.input_gram.diagonal().sqrt().clamp_min(_NO_INPUT)

    def prune_weight(self, weight: Tensor, stats: WeightStats, select: Select) -> tuple[Tensor, Tensor]:
        """See :meth:`Criterion.prune_weight`."""
        assert stats.input_gram is not None
        gram = damped(stats.input_gram.to(torch.promote_types(weight.dtype, torch.float32)))
        dense = weight.to(gram.dtype)
        size = gram.diagonal().sqrt()
        reached = dense.masked_fill(stats.input_gram.diagonal() == 0, 0)  # weights whose input is always 0 go first
        # In units of their inputs all weights are comparable: the Gram matrix has ones on its diagonal.
        keep, free = _support(reached * size, gram / torch.outer(size, size), select)
        new = least_squares(dense, keep, gram, start=free / size, iterations=_SOLVE)
        if dense.numel() <= _SMALL:
            keep, new = _better_of_magnitude(dense, keep, new, gram, stats.input_gram.to(gram.dtype), select)
        return keep, new.to(weight.dtype)


def _better_of_magnitude(
    dense: Tensor, keep: Tensor, new: Tensor, gram: Tensor, plain: Tensor, select: Select
) -> tuple[Tensor, Tensor]:
    """Return a mask and its weights, or magnitude's mask with least squares if its layer error is smaller.

    Args:
        dense: (out, in) dense weights.
        keep: (out, in) bool mask.
        new: (out, in) weights on the mask.
        gram: (in, in) damped Gram matrix.
        plain: (in, in) Gram matrix without damping, to measure the error.
        select: Keeps the largest scores.
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
        select: Keeps the largest scores.
    """
    keep = select(dense.float() ** 2)
    image = dense @ gram
    penalty, grown = _PENALTY, False
    inverse, inverted = _ridge_inverse(gram, penalty), penalty
    sparse, dual = dense * keep, torch.zeros_like(dense)
    previous = keep
    for iteration in range(1, _ITERATIONS + 1):
        # One step of ADMM: best weights near the sparse ones, projection onto the number of non-zeros, dual ascent.
        if penalty != inverted:
            inverse, inverted = _ridge_inverse(gram, penalty), penalty
        free = (image - dual + penalty * sparse) @ inverse
        shifted = free + dual / penalty
        keep = select(shifted.float() ** 2)
        sparse = shifted * keep
        dual = dual + penalty * (free - sparse)
        if iteration % _CHECK_EVERY:
            continue
        changed = int((keep ^ previous).sum()) / max(1, int(keep.sum()))
        previous = keep
        # The penalty ties both sets of weights together. As in the paper, it grows faster while the support still
        # changes much, and the iterations end when the support no longer changes.
        if changed > 0.1:
            penalty, grown = penalty * 1.3, True
        elif changed > 0.005:
            penalty, grown = penalty * 1.2, True
        elif grown:
            if changed == 0 or (iteration >= _SETTLED_AFTER and changed < _SETTLED_CHANGE):
                break
            penalty *= 1.1
        else:  # nothing has moved yet: the first penalty is too large for this layer, so loosen it
            penalty /= 5
            if penalty < _MIN_PENALTY:
                break
            if changed:
                previous = keep = select(dense.float() ** 2)
                sparse, dual = dense * keep, torch.zeros_like(dense)
    return keep, free


def _ridge_inverse(gram: Tensor, penalty: float) -> Tensor:
    """``inverse(gram + penalty)`` of a Gram matrix with ones on its diagonal.

    The penalty stays for a few iterations, each of which is then one product.
    """
    return torch.cholesky_inverse(cholesky_factor(gram, penalty))
