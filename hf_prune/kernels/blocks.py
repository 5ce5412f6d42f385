"""Units: what is removed together, as pure tensor algebra on canonical (out, in) matrices.

A :class:`Slice` is one rectangle of one tensor, a :class:`Group` the slices that go together and the
pool they compete in. Groups are the definition that every granularity must satisfy; regular grids
(single weights, blocks, N:M) compute the same with reshapes, since nobody wants forty million objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """A rectangle of a canonical (out, in) matrix.

    Args:
        tensor: Parameter name.
        rows: First and one past the last output.
        columns: First and one past the last input.
    """

    tensor: str
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def index(self) -> tuple[slice, slice]:
        """The slice as an index into the matrix."""
        return slice(*self.rows), slice(*self.columns)


@dataclass(frozen=True)
class Group:
    """Slices that are kept or removed together.

    Args:
        slices: The parts, in any number of tensors.
        pool: Groups with the same pool compete with one another.
    """

    slices: tuple[Slice, ...]
    pool: str


def grid_groups(
    tensor: str, shape: tuple[int, int], block: tuple[int, int] = (1, 1), pool: int | None = None
) -> Iterator[Group]:
    """The groups of a regular grid over one matrix, row by row.

    Args:
        tensor: Parameter name.
        shape: (out, in) of the matrix, a multiple of ``block``.
        block: (outputs, inputs) of one unit.
        pool: How many consecutive units of a row compete; None: all units of the tensor.
    """
    rows, columns = block
    for top in range(0, shape[0], rows):
        for unit, left in enumerate(range(0, shape[1], columns)):
            name = tensor if pool is None else f"{tensor}[{top}, {unit // pool}]"
            yield Group((Slice(tensor, (top, top + rows), (left, left + columns)),), name)


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


def block_sums(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Sum over each block of a grid.

    Args:
        values: (out, in), a multiple of ``block``.
        block: (outputs, inputs) of one unit.

    Returns:
        (out / rows, in / columns), of the same dtype; ``values`` itself for 1x1 blocks.
    """
    rows, columns = block
    if block == (1, 1):
        return values
    out, inputs = values.shape
    return values.reshape(out // rows, rows, inputs // columns, columns).sum((1, 3), dtype=values.dtype)


def spread_blocks(keep: Tensor, block: tuple[int, int]) -> Tensor:
    """Repeat one decision per block over the block's weights: the inverse of :func:`block_sums`.

    Args:
        keep: (out / rows, in / columns).
        block: (outputs, inputs) of one unit.

    Returns:
        (out, in), of the same dtype; ``keep`` itself for 1x1 blocks.
    """
    rows, columns = block
    if block == (1, 1):
        return keep
    return keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
