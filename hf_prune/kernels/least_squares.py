"""Least squares on a support: new values for the weights that stay, so that a layer's outputs change least.

Pure tensor algebra on canonical (out, in) matrices. A layer with weights W and inputs X (tokens, in) is changed by
``||X (V - W)ᵀ||²``, which is ``tr((V - W) H (V - W)ᵀ)`` with the Gram matrix H = XᵀX: nothing else of X is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_prune.errors import CalibrationError

_DAMPINGS = 8  # how often a matrix is damped ten times as much before it is given up
DAMPING = 0.01  # of the mean diagonal
ITERATIONS = 30
_ROUNDING = 1e-5  # of the mean diagonal: what a difference of two float32 matrices may be off by
_BLOCK = 256  # rows and columns that are factored together


def damped(gram: Tensor, share: float = DAMPING, dtype: torch.dtype | None = None) -> Tensor:
    """A Gram matrix with part of its mean diagonal added to the diagonal, so that it can be inverted.

    Args:
        gram: (in, in), of which the mean diagonal may be zero.
        share: How much of the mean diagonal is added.
        dtype: Of the result; that of the matrix, if None.

    Returns:
        (in, in), a new tensor.
    """
    found = gram.to(dtype or gram.dtype, copy=True)
    mean = found.diagonal().mean()
    found.diagonal().add_(torch.where(mean > 0, share * mean, 1.0))
    return found


def cholesky_factor(gram: Tensor, share: float = DAMPING) -> Tensor:
    """The lower Cholesky factor of a damped Gram matrix; it is damped more where rounding has spoilt it.

    That happens where what varies in the inputs is tiny beside their means, which were subtracted.

    Args:
        gram: (in, in).
        share: How much of the mean diagonal is added at first.

    Raises:
        CalibrationError: If it is not finite.
    """
    for _ in range(_DAMPINGS):
        factor, failed = torch.linalg.cholesky_ex(damped(gram, share))
        if not int(failed):
            return factor
        share *= 10
    raise CalibrationError(
        "a Gram matrix of calibration inputs cannot be factored: its values are not finite, or far from those of any "
        "inputs; check the calibration data"
    )


def inverse_factor_(gram: Tensor) -> Tensor:
    """The upper Cholesky factor U of the inverse, ``inverse(gram) = UᵀU``, in the place of the matrix itself.

    The inverse is not formed: ``gram = RRᵀ`` with R upper triangular, by a Cholesky decomposition that begins with the
    last columns, and U is the inverse of R. Both overwrite the matrix block by block, so that no second one is needed.

    Args:
        gram: (in, in), positive definite; overwritten.

    Returns:
        (in, in), the same tensor, zero below the diagonal.

    Example:
        >>> inverse_factor_(torch.tensor([[4.0, 0.0], [0.0, 0.25]]))
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
    """
    starts = range(0, len(gram), _BLOCK)
    for start in reversed(starts):
        block = slice(start, start + _BLOCK)
        corner = torch.linalg.cholesky(gram[block, block].flip(0, 1)).flip(0, 1)  # upper, R of the block
        gram[block, block] = corner
        panel = torch.linalg.solve_triangular(corner.t(), gram[:start, block], upper=False, left=False)
        gram[:start, block] = panel
        for left in range(0, start, _BLOCK):  # the upper half of what is left
            stop = min(left + _BLOCK, start)
            gram[:stop, left:stop].addmm_(panel[:stop], panel[left:stop].t(), alpha=-1)
    gram.triu_()
    for start in starts:
        block = slice(start, start + _BLOCK)
        one = torch.eye(len(gram[block]), dtype=gram.dtype, device=gram.device)
        corner = torch.linalg.solve_triangular(gram[block, block], one, upper=True)
        gram[:start, block] = -(gram[:start, :start] @ gram[:start, block] @ corner)
        gram[block, block] = corner
    return gram


def layer_errors(weight: Tensor, new: Tensor, gram: Tensor) -> Tensor:
    """Mean squared change of each of a layer's outputs.

    Args:
        weight: (out, in) before.
        new: (out, in) after.
        gram: (in, in) mean of xxᵀ over the tokens.

    Returns:
        (out,).
    """
    change = (new - weight).to(gram.dtype)
    return ((change @ gram) * change).sum(1)


def layer_error(weight: Tensor, new: Tensor, gram: Tensor) -> Tensor:
    """Mean squared change of a layer's outputs, summed over the outputs: see :func:`layer_errors`."""
    return layer_errors(weight, new, gram).sum()


def least_squares(
    weight: Tensor, keep: Tensor, gram: Tensor, start: Tensor | None = None, iterations: int = ITERATIONS
) -> Tensor:
    """The weights on a support whose outputs are closest to those of the dense weights.

    Conjugate gradients, all rows at once, with the diagonal as preconditioner. Every iteration lowers the error
    or leaves it, so stopping early is never worse than the start.

    Args:
        weight: (out, in) dense weights.
        keep: (out, in) bool, True where a weight may differ from zero.
        gram: (in, in) Gram matrix of the inputs, positive definite: see :func:`damped`.
        start: (out, in) where to begin; the dense weights that are kept, if None.
        iterations: How many at most.

    Returns:
        (out, in) of the Gram matrix's dtype, zero where ``keep`` is False.

    Example:
        >>> gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        >>> least_squares(torch.ones(1, 2), torch.tensor([[True, False]]), gram)
        tensor([[1.5000, 0.0000]])
    """
    target = weight.to(gram.dtype)
    support = keep.to(gram.dtype)
    found = (target if start is None else start.to(gram.dtype)) * support
    residual = ((target - found) @ gram) * support
    inverse = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).reciprocal()
    scaled = residual * inverse
    direction = scaled.clone()
    size = (residual * scaled).sum(1, keepdim=True)  # (out, 1)
    enough = size * torch.finfo(gram.dtype).eps ** 2
    for _ in range(iterations):
        image = (direction @ gram) * support
        curvature = (direction * image).sum(1, keepdim=True)
        running = (size > enough) & (curvature > 0)
        if not bool(running.any()):
            break
        step = torch.where(running, size / curvature.masked_fill(~running, 1), 0)
        found.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        scaled = residual * inverse
        previous, size = size, (residual * scaled).sum(1, keepdim=True)
        direction.mul_(torch.where(running, size / previous.masked_fill(~running, 1), 0)).add_(scaled)
    return found


def with_output_correction(weight: Tensor, gram: Tensor, changes: Tensor, share: float = 0.1) -> Tensor:
    """Weights that add to a layer's outputs what these lack, as far as the inputs can tell it.

    Ridge regression: what the inputs tell only faintly is left as it is.

    Args:
        weight: (out, in).
        gram: (in, in) mean of xxᵀ over the tokens.
        changes: (out, in) mean of dxᵀ over the tokens, with d (out,) what the outputs for x lack.
        share: Penalty on what is added, in units of the mean diagonal.

    Returns:
        (out, in) of the Gram matrix's dtype.
    """
    factor = cholesky_factor(gram.double(), share)
    return weight.to(gram.dtype) + torch.cholesky_solve(changes.double().t(), factor).t().to(gram.dtype)


def refit(
    weight: Tensor,
    keep: Tensor,
    gram: Tensor,
    mean: Tensor | None = None,
    bias: Tensor | None = None,
    change: Tensor | None = None,
    products: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`least_squares`, together with the bias where there is one.

    Args:
        weight: (out, in) dense weights.
        keep: (out, in) bool, True where a weight may differ from zero.
        gram: (in, in) mean of xxᵀ over the tokens; it need not be positive definite.
        mean: (in,) mean of x, needed with a bias.
        bias: (out,), or None.
        change: (out,) mean of what the outputs are to gain, None for nothing.
        products: (out, in) mean of that times x.
        start: (out, in) where to begin.

    Returns:
        The weights, of the Gram matrix's dtype or the weight's if that is wider, and the bias, None if there is none.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    gram, goal = gram.to(dtype), weight.to(dtype)
    if bias is not None:  # the bias takes care of the means, so that the weights need only do so for the rest
        assert mean is not None
        mean = mean.to(dtype)
        rounding = _ROUNDING * gram.diagonal().mean() * torch.eye(len(gram), dtype=dtype, device=gram.device)
        gram = gram - torch.outer(mean, mean) + rounding
        if products is not None and change is not None:
            products = products - torch.outer(change, mean)
    if products is not None:
        goal = with_output_correction(goal, gram, products)
    found = least_squares(goal, keep, damped(gram), start=start)
    if bias is None or mean is None:
        return found, None
    shift = (weight.to(dtype) - found) @ mean
    return found, bias + (shift if change is None else shift + change.to(dtype))
