"""A matrix that is sparse in blocks of 16 rows of one column, and products with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.kernels.sparse.entries import Checked, check_tensors, check_weight, starts_of, unsigned

ROWS = 16  # of a block
MOST_INPUTS = 1 << 16  # that 16 bits can number


@dataclass(frozen=True, eq=False)
class RowBlocks(Checked):
    """The blocks of 16 x 1 weights of a matrix that are not all zero, what ``granularity="block:16x1"`` leaves.

    Args:
        values: (blocks * 16,) float32, bfloat16 or float16.
        columns: (blocks,) int16, to be read as unsigned.
        starts: (rows of blocks + 1,) int32: where each row of blocks begins.
        outputs: Rows of the matrix; the last blocks are filled up if they are not a multiple of 16.
        inputs: Columns of the matrix, at most 65,536.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    outputs: int
    inputs: int

    def __post_init__(self) -> None:
        """Make sure that no block lies outside of the matrix: the kernel reads what it is told to.

        Raises:
            ValueError: If a block does, or a tensor has another shape or dtype.
        """
        check_tensors(self.values, (self.columns, torch.int16), (self.starts, torch.int32))
        blocks = int(self.starts[-1]) if len(self.starts) else -1
        rising = bool((self.starts.diff() >= 0).all()) and blocks >= 0 and int(self.starts[0]) == 0
        sizes = (len(self.starts) - 1, len(self.columns), len(self.values))
        if self.inputs > MOST_INPUTS or not rising or sizes != (-(-self.outputs // ROWS), blocks, ROWS * blocks):
            raise ValueError(f"found {sizes} rows of blocks, columns and values, and {blocks} blocks: they do not fit")
        if blocks and int(unsigned(self.columns).max()) >= self.inputs:
            raise ValueError(f"found input {int(unsigned(self.columns).max())}: expected less than {self.inputs}")

    @classmethod
    def from_dense(cls, weight: Tensor) -> RowBlocks:
        """Take the blocks of a matrix that are not all zero.

        Args:
            weight: (outputs, inputs) float32, bfloat16 or float16, on the CPU.

        Raises:
            ValueError: If the weight has another number of dimensions, dtype or device, or more than 65,536 inputs.
        """
        check_weight(weight, MOST_INPUTS)
        blocks = in_blocks(weight.detach())
        rows, columns = blocks.ne(0).any(1).nonzero(as_tuple=True)
        return cls(
            blocks[rows, :, columns].reshape(-1),
            columns.to(torch.int32).to(torch.int16),
            starts_of(torch.bincount(rows, minlength=len(blocks))),
            *weight.shape,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.columns, self.starts))

    def to_dense(self) -> Tensor:
        """(outputs, inputs): the matrix, bit for bit but for negative zeros in blocks that are all zero."""
        rows = torch.arange(len(self.starts) - 1).repeat_interleave(self.starts.diff().to(torch.int64))
        blocks = self.values.new_zeros(len(self.starts) - 1, ROWS, self.inputs)
        blocks[rows, :, unsigned(self.columns)] = self.values.view(-1, ROWS)
        return blocks.view(len(blocks) * ROWS, self.inputs)[: self.outputs].contiguous()

    def linear(self, x: Tensor, bias: Tensor | None = None, level: str = "") -> Tensor:
        """``x @ weight.T + bias``; see :meth:`~hf_prune.kernels.sparse.sparse_rows.SparseRows.linear`."""
        product: Tensor = torch.ops.hf_prune.blocks_linear(
            x, self.values, self.columns, self.starts, bias, self.outputs, self.inputs, level
        )
        return product


def in_blocks(weight: Tensor) -> Tensor:
    """(rows of blocks, 16, inputs), filled up with zeros."""
    outputs, inputs = weight.shape
    rows = -(-outputs // ROWS)
    padded = weight.new_zeros(rows * ROWS, inputs)
    padded[:outputs] = weight
    return padded.view(rows, ROWS, inputs)
