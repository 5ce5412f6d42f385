"""Slow twins of the library: what is removed, worked out unit by unit with stable sorts and explicit Groups."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_prune.granularities.registry import parse_granularity
from hf_prune.kernels.matrix import Target


def reference_matrix(target: Target, weight: Tensor) -> Tensor:
    """The canonical (out, in) matrix, element by element."""
    if target.layout == "linear":
        return weight.clone()
    if target.layout == "conv1d":
        return torch.stack([weight[:, out] for out in range(weight.shape[1])])
    positions = [range(size) for size in weight.shape[2:]]
    columns = [(channel, *at) for at in itertools.product(*positions) for channel in range(weight.shape[1])]
    return torch.stack([torch.stack([row[column] for column in columns]) for row in weight])


def reference_keep(scores: Sequence[float], k: int) -> list[bool]:
    """Remove the k lowest of one pool; of equal ones the earlier goes first."""
    gone = set(sorted(range(len(scores)), key=lambda i: scores[i])[:k])  # sorted() is stable
    return [i not in gone for i in range(len(scores))]


def reference_masks(
    granularity: str,
    scope: str,
    sparsity: Mapping[str, float],
    targets: Sequence[Target],
    scores: Mapping[str, Tensor],
    old: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Canonical masks by parameter name.

    Args:
        granularity: Its spelling.
        scope: ``"row"``, ``"layer"`` or ``"global"``.
        sparsity: Of each target; all alike in global scope.
        targets: In the order of the model.
        scores: Canonical scores of weights, by parameter name.
        old: Canonical masks of earlier prunings, by parameter name.
    """
    kind = parse_granularity(granularity)
    old = old or {}
    pools: dict[str, list[tuple[str, tuple[slice, slice], float]]] = {}
    share: dict[str, float] = {}
    for target in targets:
        for group in kind.groups(target.name, target.matrix_shape):
            (part,) = group.slices
            values = scores[target.name][part.index].double()
            left = old[target.name][part.index] if target.name in old else torch.ones_like(values, dtype=torch.bool)
            score = float((values * left).sum()) if left.any() else float("-inf")
            pool = group.pool
            if kind.pool is None:
                pool = {"row": f"{target.name}[{part.rows[0]}]", "layer": target.name, "global": "all"}[scope]
            pools.setdefault(pool, []).append((target.name, part.index, score))
            share[pool] = sparsity[target.name]
    masks = {t.name: torch.ones(t.matrix_shape, dtype=torch.bool) for t in targets}
    for pool, units in pools.items():
        kept = reference_keep([score for _, _, score in units], round(share[pool] * len(units)))
        for (name, index, _), keep in zip(units, kept, strict=True):
            masks[name][index] = keep
    return {name: mask & old[name] if name in old else mask for name, mask in masks.items()}


def reference_erk(sparsity: float, targets: Sequence[Target]) -> dict[str, float]:
    """Erdős–Rényi kernel sparsities: the scale of the capped densities, by bisection."""
    raw = {t.name: sum(t.shape) / t.size for t in targets}
    kept = (1 - sparsity) * sum(t.size for t in targets)
    low, high = 0.0, max(1 / value for value in raw.values())
    for _ in range(200):
        scale = (low + high) / 2
        if sum(min(1.0, raw[t.name] * scale) * t.size for t in targets) < kept:
            low = scale
        else:
            high = scale
    return {name: 1 - min(1.0, value * high) for name, value in raw.items()}
