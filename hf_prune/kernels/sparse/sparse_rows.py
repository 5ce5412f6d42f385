"""A sparse matrix in the format of the kernel, and products with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.kernels.sparse.entries import Checked, check_tensors, check_weight, unsigned

WIDEST_CHUNK = 1 << 16  # inputs that 16 bits can number


@dataclass(frozen=True, eq=False)
class SparseRows(Checked):
    """The weights of a matrix that are not zero, row by row in chunks of neighbouring inputs.

    Args:
        values: (nonzero,) float32, bfloat16 or float16.
        columns: (nonzero,) int16, to be read as unsigned: the number of the input inside its chunk.
        starts: (chunks * outputs + 1,) int32: where each row of each chunk begins.
        outputs: Rows of the matrix.
        inputs: Columns of the matrix.
        chunk: How many inputs a chunk has. About 256 suit 32 tokens and more, whose part of the inputs then fits into
            the first-level cache; for a few tokens one chunk is best.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    outputs: int
    inputs: int
    chunk: int

    def __post_init__(self) -> None:
        """Make sure that no entry points outside of the matrix: the kernel reads what it is told to.

        Raises:
            ValueError: If an entry does, or a tensor has another shape or dtype.
        """
        chunks = max(1, -(-self.inputs // self.chunk)) if 1 <= self.chunk <= WIDEST_CHUNK else 0
        check_tensors(self.values, (self.columns, torch.int16), (self.starts, torch.int32))
        if not chunks:
            raise ValueError(f"found chunks of {self.chunk}: expected 1 to {WIDEST_CHUNK}")
        counts = self.starts.diff()
        whole = len(self.starts) == chunks * self.outputs + 1 and int(self.starts[0]) == 0
        if not whole or bool((counts < 0).any()) or not int(self.starts[-1]) == len(self.values) == len(self.columns):
            raise ValueError(
                f"found {len(self.starts)} starts for {chunks} chunks of {self.outputs} outputs, up to entry "
                f"{int(self.starts[-1])} of {len(self.values)} values and {len(self.columns)} columns: they do not fit"
            )
        for number in range(chunks):
            first, last = self.starts[number * self.outputs], self.starts[(number + 1) * self.outputs]
            inside = unsigned(self.columns[first:last])
            width = min(self.chunk, self.inputs - number * self.chunk)
            if len(inside) and int(inside.max()) >= width:
                raise ValueError(f"found input {int(inside.max())} in a chunk of {width} inputs: expected less")

    @classmethod
    def from_dense(cls, weight: Tensor, chunk: int = 256) -> SparseRows:
        """Take the entries of a matrix that are not zero, of either sign.

        Args:
            weight: (outputs, inputs) float32, bfloat16 or float16, on the CPU.
            chunk: How many inputs a chunk has.

        Raises:
            ValueError: If the weight has another number of dimensions, dtype or device.
        """
        check_weight(weight)
        outputs, inputs = weight.shape
        values, columns, counts = [], [], []
        for of_chunk in weight.detach().split(chunk, 1):
            rows, inside = of_chunk.nonzero(as_tuple=True)
            values.append(of_chunk[rows, inside])
            columns.append(inside.to(torch.int32).to(torch.int16))
            counts.append(torch.bincount(rows, minlength=outputs))
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), *counts]).cumsum(0).to(torch.int32)
        if not inputs:
            starts = torch.zeros(outputs + 1, dtype=torch.int32)
        empty = weight.detach().new_empty(0), torch.empty(0, dtype=torch.int16)
        return cls(torch.cat([empty[0], *values]), torch.cat([empty[1], *columns]), starts, outputs, inputs, chunk)

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.columns, self.starts))

    def to_dense(self) -> Tensor:
        """(outputs, inputs): the matrix, bit for bit but for negative zeros."""
        chunks = max(1, -(-self.inputs // self.chunk))
        counts = self.starts.diff().to(torch.int64)
        place = torch.arange(chunks * self.outputs).repeat_interleave(counts)  # chunk * outputs + row
        columns = place.div(max(1, self.outputs), rounding_mode="floor") * self.chunk + unsigned(self.columns)
        dense = self.values.new_zeros(self.outputs, self.inputs)
        dense[place % max(1, self.outputs), columns] = self.values
        return dense

    def linear(self, x: Tensor, bias: Tensor | None = None, level: str = "") -> Tensor:
        """``x @ weight.T + bias`` by the compiled kernel, with sums in float32; no gradients flow through it.

        Args:
            x: (..., inputs), of the dtype of the values, on the CPU.
            bias: (outputs,) or None.
            level: ``"avx512"``, ``"avx2"`` or ``"portable"``; empty for the best that the processor has.

        Returns:
            (..., outputs) like ``x``.

        Raises:
            RuntimeError: If a shape or dtype does not fit, the processor lacks the level, or the kernel is not loaded;
                see :func:`~hf_prune.kernels.sparse.build.load_kernel`.
        """
        product: Tensor = torch.ops.hf_prune.sparse_linear(
            x, self.values, self.columns, self.starts, bias, self.outputs, self.inputs, self.chunk, level
        )
        return product
