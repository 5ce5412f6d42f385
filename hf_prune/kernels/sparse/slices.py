"""A sparse matrix for few tokens: 16 rows side by side, and products with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.kernels.sparse.entries import Checked, check_tensors, check_weight, kept_entries, starts_of, unsigned

ROWS = 16  # of a slice
MOST_INPUTS = (1 << 16) - 1  # 16 bits number them and the zero behind them


@dataclass(frozen=True, eq=False)
class SlicedRows(Checked):
    """The weights of a matrix that are not zero, in slices of 16 rows of about the same length (SELL-16).

    The rows are sorted by their numbers of weights, so that little is filled up: with zeros that read an input of zero.
    Kreutzer et al., "A unified sparse matrix data format for efficient general sparse matrix-vector multiplication on
    modern processors with wide SIMD units" (2014).

    Args:
        values: (steps * 16,) float32, bfloat16 or float16.
        columns: (steps * 16,) int16, to be read as unsigned; ``inputs`` where a row is filled up.
        starts: (slices + 1,) int32: where each slice begins, in steps.
        rows: (slices * 16,) int32: the row of each lane; ``outputs`` for lanes without one.
        outputs: Rows of the matrix.
        inputs: Columns of the matrix, at most 65,535.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    rows: Tensor
    outputs: int
    inputs: int

    def __post_init__(self) -> None:
        """Make sure that no entry points outside of the matrix: the kernel reads what it is told to.

        Raises:
            ValueError: If an entry does, or a tensor has another shape or dtype.
        """
        slices = -(-self.outputs // ROWS)
        check_tensors(self.values, (self.columns, torch.int16), (self.starts, torch.int32), (self.rows, torch.int32))
        lengths = {len(self.values), len(self.columns), ROWS * int(self.starts[-1]) if len(self.starts) else -1}
        rising = len(self.starts) == slices + 1 and int(self.starts[0]) == 0 and bool((self.starts.diff() >= 0).all())
        if self.inputs > MOST_INPUTS or not rising or len(lengths) > 1 or len(self.rows) != ROWS * slices:
            raise ValueError(
                f"found {len(self.starts)} starts, {lengths} entries, {len(self.rows)} rows: they disagree"
            )
        if len(self.columns) and int(unsigned(self.columns).max()) > self.inputs:
            raise ValueError(f"found input {int(unsigned(self.columns).max())}: expected at most {self.inputs}")
        expected = torch.arange(ROWS * slices, dtype=torch.int32).clamp(max=self.outputs)
        if not torch.equal(self.rows.sort().values, expected):
            raise ValueError("found rows that are not each row of the matrix once")

    @classmethod
    def from_dense(cls, weight: Tensor) -> SlicedRows:
        """Take the entries of a matrix that are not zero, of either sign.

        Args:
            weight: (outputs, inputs) float32, bfloat16 or float16, on the CPU.

        Raises:
            ValueError: If the weight has another number of dimensions, dtype or device, or more than 65,535 inputs.
        """
        check_weight(weight, MOST_INPUTS)
        outputs, inputs = weight.shape
        entries = kept_entries(weight)
        lengths = torch.bincount(entries.rows, minlength=outputs)
        slices = -(-outputs // ROWS)
        order = lengths.argsort(descending=True, stable=True)
        rows = torch.full((ROWS * slices,), outputs, dtype=torch.int32)
        rows[:outputs] = order.to(torch.int32)
        steps = torch.zeros(ROWS * slices, dtype=torch.int64)
        steps[:outputs] = lengths[order]
        starts = starts_of(steps.view(slices, ROWS).amax(1))
        place = torch.empty(outputs, dtype=torch.int64)
        place[order] = torch.arange(outputs)
        of_entry = place[entries.rows]
        before = starts_of(lengths)[:-1].to(torch.int64)
        step = torch.arange(len(entries.rows)) - before[entries.rows]
        where = (starts[of_entry // ROWS].to(torch.int64) + step) * ROWS + of_entry % ROWS
        values = weight.detach().new_zeros(ROWS * int(starts[-1]))
        values[where] = entries.values
        columns = torch.full((len(values),), inputs)
        columns[where] = entries.columns
        return cls(values, columns.to(torch.int32).to(torch.int16), starts, rows, outputs, inputs)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.columns, self.starts, self.rows))

    def to_dense(self) -> Tensor:
        """(outputs, inputs): the matrix, bit for bit but for negative zeros."""
        steps = self.starts.diff().to(torch.int64)
        slices = torch.arange(len(steps)).repeat_interleave(steps)  # (steps,)
        rows = self.rows.view(-1, ROWS)[slices].reshape(-1).to(torch.int64)
        dense = self.values.new_zeros(self.outputs + 1, self.inputs + 1)
        dense[rows, unsigned(self.columns)] = self.values
        return dense[: self.outputs, : self.inputs].contiguous()

    def linear(self, x: Tensor, bias: Tensor | None = None, level: str = "") -> Tensor:
        """``x @ weight.T + bias``; see :meth:`~hf_prune.kernels.sparse.sparse_rows.SparseRows.linear`."""
        product: Tensor = torch.ops.hf_prune.sliced_linear(
            x, self.values, self.columns, self.starts, self.rows, bias, self.outputs, self.inputs, level
        )
        return product
