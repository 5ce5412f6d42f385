"""Least squares on a support: new values for the weights that stay, so that a layer's outputs change least.

Pure tensor algebra on canonical (out, in) matrices. A layer with weights W and inputs X (tokens, in) is changed by
``||X (V - W)ᵀ||²``, which is ``tr((V - W) H (V - W)ᵀ)`` with the Gram matrix H = XᵀX: nothing else of X is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal
ITERATIONS = 30
_ROUNDING = 1e-5  # of the mean diagonal: what a difference of two float32 matrices may be off by


def damped(gram: Tensor, share: float = DAMPING) -> Tensor:
    """A Gram matrix with part of its mean diagonal added to the diagonal, so that it can be inverted.

    Args:
        gram: (in, in), of which the mean diagonal may be zero.
        share: How much of the mean diagonal is added.

    Returns:
        (in, in), a new tensor.
    """
    mean = gram.diagonal().mean()
    return gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * torch.where(mean > 0, share * mean, 1.0)


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


def corrected(weight: Tensor, gram: Tensor, changes: Tensor, share: float = 0.1) -> Tensor:
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
    factor = torch.linalg.cholesky(damped(gram.double(), share))
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
        goal = corrected(goal, gram, products)
    found = least_squares(goal, keep, damped(gram), start=start)
    if bias is None or mean is None:
        return found, None
    shift = (weight.to(dtype) - found) @ mean
    return found, bias + (shift if change is None else shift + change.to(dtype))
