"""Units on a regular grid over canonical (out, in) matrices: weights that are removed together.

A :class:`Slice` is one rectangle of one tensor, and a :class:`Group` the slices that are removed together and the pool
in which they compete. Groups define what every granularity means; pruning computes the same with reshapes, since a
model would have forty million of these objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    """Repeat one value per block over the block's weights: the inverse of :func:`block_sums`.

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
