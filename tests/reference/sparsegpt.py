"""SparseGPT as its paper writes it, in matrices: what ours is timed against, and a twin of the twin."""

from __future__ import annotations

import torch
from torch import Tensor


def published_sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float, block: int = 128, pool: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv:2301.00774 line by line, in float32: blocks of columns, lazy updates of the rest.

    Args:
        weight: (out, in) float32.
        gram: (in, in) float32.
        sparsity: Share of each block that is removed.
        block: Columns of a block.
        pool: (N, M) for N:M masks.

    Returns:
        The mask, True = keep, and the weight.
    """
    weight = weight.clone()
    rows, columns = weight.shape
    damping = 0.01 * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + damping))
    upper = torch.linalg.cholesky(inverse, upper=True)
    keep = torch.ones(rows, columns, dtype=torch.bool)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros(rows, stop - start, dtype=weight.dtype)
        if pool is None:
            costs = weight[:, start:stop] ** 2 / upper.diagonal()[start:stop] ** 2
            gone = costs.flatten().argsort(stable=True)[: round(sparsity * costs.numel())]
            keep[:, start:stop] = torch.ones(costs.numel(), dtype=torch.bool).index_fill(0, gone, False).view_as(costs)
        for j in range(start, stop):
            if pool is not None and j % pool[1] == 0:
                end = j + pool[1]
                costs = weight[:, j:end] ** 2 / upper.diagonal()[j:end] ** 2
                gone = costs.argsort(dim=1, stable=True)[:, : pool[1] - pool[0]]
                keep[:, j:end] = torch.ones_like(costs, dtype=torch.bool).scatter(1, gone, False)
            errors[:, j - start] = torch.where(keep[:, j], 0, weight[:, j]) / upper[j, j]
            weight[:, j:stop] -= errors[:, j - start, None] @ upper[j, None, j:stop]
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return keep, weight * keep
