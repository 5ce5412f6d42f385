"""Slow twins of layer-wise reconstruction: exact least squares, all supports tried, and SparseGPT as published."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def reference_least_squares(weight: Tensor, keep: Tensor, inputs: Tensor) -> Tensor:
    """Row by row: the weights on the support whose outputs on ``inputs`` (tokens, in) are closest to the dense ones."""
    result = torch.zeros_like(weight)
    for i, row in enumerate(weight):
        support = keep[i].nonzero().squeeze(1)
        if len(support):
            solution = torch.linalg.lstsq(inputs[:, support], (inputs @ row)[:, None]).solution
            result[i, support] = solution.squeeze(1)
    return result


def reference_error(weight: Tensor, new: Tensor, inputs: Tensor) -> float:
    """Mean over the tokens of the squared change of the outputs."""
    return float(((inputs @ (new - weight).t()) ** 2).sum() / len(inputs))


def reference_best_rows(weight: Tensor, inputs: Tensor, k: int) -> Tensor:
    """The best of all masks that remove ``k`` weights of every row, weights solved exactly."""
    columns = range(weight.shape[1])
    best = []
    for row in weight:
        found = []
        for gone in itertools.combinations(columns, k):
            keep = torch.tensor([[j not in gone for j in columns]])
            new = reference_least_squares(row[None], keep, inputs)
            found.append((reference_error(row[None], new, inputs), new))
        best.append(min(found, key=lambda pair: pair[0])[1])
    return torch.cat(best)


def reference_sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float, block: int = 128, pool: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv:2301.00774, element by element, with the mask chosen for each block of columns.

    Args:
        weight: (out, in).
        gram: (in, in).
        sparsity: Share of each block that is removed.
        block: Columns of a block.
        pool: (N, M) for N:M masks.

    Returns:
        The mask, True = keep, and the weight.
    """
    weight = weight.double().clone()
    rows, columns = weight.shape
    hessian = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    keep = torch.ones(rows, columns, dtype=torch.bool)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros(rows, stop - start, dtype=torch.float64)
        if pool is None:
            costs = [
                (float(weight[i, j] ** 2 / upper[j, j] ** 2), i, j) for i in range(rows) for j in range(start, stop)
            ]
            for _, i, j in sorted(costs)[: round(sparsity * len(costs))]:
                keep[i, j] = False
        for j in range(start, stop):
            if pool is not None and j % pool[1] == 0:
                for i in range(rows):
                    costs = [(float(weight[i, q] ** 2 / upper[q, q] ** 2), i, q) for q in range(j, j + pool[1])]
                    for _, _, q in sorted(costs)[: pool[1] - pool[0]]:
                        keep[i, q] = False
            for i in range(rows):
                if not keep[i, j]:
                    errors[i, j - start] = weight[i, j] / upper[j, j]
                    weight[i, j:stop] -= errors[i, j - start] * upper[j, j:stop]
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return keep, weight * keep


def reference_obs(row: Tensor, gram: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon (Hassibi and Stork 1992) on one output: ``k`` weights go one after the other.

    Each time the weight goes whose removal costs least, ``w_j² / [H⁻¹]_jj``, and the others make up for it; the inverse
    is that of the Gram matrix of what is left, computed anew.

    Args:
        row: (in,).
        gram: (in, in), positive definite.
        k: How many weights go.

    Returns:
        The mask, True = keep, and the weights.
    """
    row, left = row.double().clone(), list(range(len(row)))
    for _ in range(k):
        inverse = torch.linalg.inv(gram.double()[left][:, left])
        costs = [float(row[j] ** 2 / inverse[i, i]) for i, j in enumerate(left)]
        i = costs.index(min(costs))
        row[left] -= row[left[i]] / inverse[i, i] * inverse[:, i]
        row[left.pop(i)] = 0
    keep = torch.zeros(len(row), dtype=torch.bool)
    keep[left] = True
    return keep, row * keep
