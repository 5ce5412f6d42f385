"""Least squares on a support: new values for the weights that stay, so that a layer's outputs change least.

Pure tensor algebra on canonical (out, in) matrices. Replacing the weights W of a layer with inputs X (tokens, in) by V
changes its outputs by ``||X (V - W)ᵀ||²``. That equals ``tr((V - W) H (V - W)ᵀ)`` with the Gram matrix H = XᵀX, so H is
all that is needed of X.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_prune.errors import CalibrationError

_DAMPINGS = 8  # attempts to factor a matrix, each damped ten times as much as the one before
DAMPING = 0.01  # of the mean diagonal
ITERATIONS = 30
_ROUNDING = 1e-5  # of the mean diagonal: the rounding error of a difference of two float32 matrices
_BLOCK = 256  # rows and columns that are factored together


def damped(gram: Tensor, share: float = DAMPING, dtype: torch.dtype | None = None) -> Tensor:
    """Add part of the mean diagonal of a Gram matrix to its diagonal, so that it can be inverted.

    Args:
        gram: (in, in); its mean diagonal may be zero, and then 1 is added.
        share: How much of the mean diagonal is added.
        dtype: Of the result; that of the matrix, if None.

    Returns:
        (in, in), a new tensor.
    """
    result = gram.to(dtype or gram.dtype, copy=True)
    mean = result.diagonal().mean()
    result.diagonal().add_(torch.where(mean > 0, share * mean, 1.0))
    return result


def cholesky_factor(gram: Tensor, share: float = DAMPING) -> Tensor:
    """The lower Cholesky factor of a damped Gram matrix, damped more if rounding has made it indefinite.

    That happens after the means of the inputs were subtracted, if they are large and the inputs hardly vary.

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
        "a Gram matrix of calibration inputs cannot be factored: its values are not finite, or not those of any "
        "inputs; check the calibration data"
    )


def inverse_factor_(gram: Tensor) -> Tensor:
    """The upper Cholesky factor U of the inverse, ``inverse(gram) = UᵀU``, in place.

    The inverse is never formed: ``gram = RRᵀ`` with R upper triangular, by a Cholesky decomposition that starts with
    the last columns, and U is the inverse of R. Both overwrite the matrix block by block, so that no second matrix is
    needed.

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
        for column in range(0, start, _BLOCK):  # of the remaining corner, the upper half is enough
            stop = min(column + _BLOCK, start)
            gram[:stop, column:stop].addmm_(panel[:stop], panel[column:stop].t(), alpha=-1)
    gram.triu_()
    for start in starts:  # invert R: the columns before are inverted already, those of the block follow from them
        block = slice(start, start + _BLOCK)
        identity = torch.eye(len(gram[block]), dtype=gram.dtype, device=gram.device)
        corner = torch.linalg.solve_triangular(gram[block, block], identity, upper=True)
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
    """The weights on a support whose outputs are closest to the outputs of the dense weights.

    Every row has a support of its own, so a direct solution would factor one matrix per row. Instead, conjugate
    gradients run on all rows at once, with the diagonal as preconditioner: one product with the Gram matrix per
    iteration. No iteration raises the error, so stopping early is never worse than the start.

    Args:
        weight: (out, in) dense weights.
        keep: (out, in) bool, True where a weight may differ from zero.
        gram: (in, in) Gram matrix of the inputs, positive definite: see :func:`damped`.
        start: (out, in) first guess; None for the dense weights that are kept.
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
    solution = (target if start is None else start.to(gram.dtype)) * support
    residual = ((target - solution) @ gram) * support
    inverse = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).reciprocal()
    scaled = residual * inverse
    direction = scaled.clone()
    size = (residual * scaled).sum(1, keepdim=True)  # (out, 1)
    enough = size * torch.finfo(gram.dtype).eps ** 2
    for _ in range(iterations):
        image = (direction @ gram) * support
        curvature = (direction * image).sum(1, keepdim=True)
        running = (size > enough) & (curvature > 0)  # rows that have converged stand still
        if not bool(running.any()):
            break
        step = torch.where(running, size / curvature.masked_fill(~running, 1), 0)
        solution.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        scaled = residual * inverse
        previous, size = size, (residual * scaled).sum(1, keepdim=True)
        direction.mul_(torch.where(running, size / previous.masked_fill(~running, 1), 0)).add_(scaled)
    return solution


def with_output_correction(weight: Tensor, gram: Tensor, changes: Tensor, share: float = 0.1) -> Tensor:
    """Change weights so that a layer's outputs change as asked, as far as its inputs can predict that change.

    Ridge regression: directions in which the inputs hardly vary are left as they are.

    Args:
        weight: (out, in).
        gram: (in, in) mean of xxᵀ over the tokens.
        changes: (out, in) mean of dxᵀ over the tokens, with d (out,) the change asked of the outputs for x.
        share: Penalty on the change of the weights, in units of the mean diagonal.

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
    """:func:`least_squares`, with a new bias where there is one.

    Args:
        weight: (out, in) dense weights.
        keep: (out, in) bool, True where a weight may differ from zero.
        gram: (in, in) mean of xxᵀ over the tokens; it need not be positive definite.
        mean: (in,) mean of x, needed with a bias.
        bias: (out,), or None.
        change: (out,) mean change asked of the outputs, None for no change.
        products: (out, in) mean of that change times x.
        start: (out, in) first guess.

    Returns:
        The weights, of the Gram matrix's dtype or the weight's if that is wider, and the bias, None if there is none.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    gram, dense = gram.to(dtype), weight.to(dtype)
    if bias is not None:
        # The best bias makes the mean output right whatever the weights are. So these are solved with the covariance
        # of the inputs in place of their Gram matrix, and the bias follows.
        assert mean is not None
        mean = mean.to(dtype)
        rounding = _ROUNDING * gram.diagonal().mean() * torch.eye(len(gram), dtype=dtype, device=gram.device)
        gram = gram - torch.outer(mean, mean) + rounding
        if products is not None and change is not None:
            products = products - torch.outer(change, mean)
    if products is not None:
        dense = with_output_correction(dense, gram, products)
    new = least_squares(dense, keep, damped(gram), start=start)
    if bias is None or mean is None:
        return new, None
    shift = (weight.to(dtype) - new) @ mean
    return new, bias + (shift if change is None else shift + change.to(dtype))
