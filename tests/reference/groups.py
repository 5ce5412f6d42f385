"""Slow twins of the reshapes in ``hf_prune.kernels.blocks``: sums and masks of explicit groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_prune.kernels.blocks import Group


def group_scores(groups: Sequence[Group], scores: Mapping[str, Tensor]) -> Tensor:
    """Sum of the scores in each group.

    Args:
        groups: The units.
        scores: (out, in) scores by parameter name.

    Returns:
        (groups,) float32.
    """
    return torch.stack([torch.stack([scores[s.tensor][s.index].float().sum() for s in g.slices]).sum() for g in groups])


def spread_groups(groups: Sequence[Group], keep: Tensor, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Turn one decision per group into one mask per tensor.

    Args:
        groups: The units.
        keep: (groups,) bool, True = keep.
        shapes: (out, in) of each tensor.

    Returns:
        (out, in) bool masks by parameter name, True where nothing removes the weight.
    """
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for group, kept in zip(groups, keep.tolist(), strict=True):
        if not kept:
            for part in group.slices:
                masks[part.tensor][part.index] = False
    return masks
