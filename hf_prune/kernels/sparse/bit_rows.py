"""A sparse matrix for few tokens: a bit for each weight and the values that are not zero, and products with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.kernels.sparse.entries import Checked, check_tensors, check_weight, starts_of

_WORD = 32
_SPARE = 32  # values behind the last, so that a whole vector can be read anywhere


@dataclass(frozen=True, eq=False)
class BitRows(Checked):
    """The weights of a matrix that are not zero, row by row, and a bit for each weight that says whether it is there.

    A product with an input that is infinite or NaN is NaN in bfloat16 also where the weight is zero, as in a dense one.

    Args:
        values: (nonzero + 32,) float32, bfloat16 or float16; the last 32 are zeros.
        bits: (outputs * words,) int32, a row after the other; the lowest bit of a word is the first of its 32 inputs.
        starts: (outputs + 1,) int32: where each row begins among the values.
        outputs: Rows of the matrix.
        inputs: Columns of the matrix.
    """

    values: Tensor
    bits: Tensor
    starts: Tensor
    outputs: int
    inputs: int

    def __post_init__(self) -> None:
        """Make sure that no bit stands for an input that is not there, and that each has its value.

        Raises:
            ValueError: If a bit does, or a tensor has another shape or dtype.
        """
        check_tensors(self.values, (self.bits, torch.int32), (self.starts, torch.int32))
        words = -(-self.inputs // _WORD)
        if len(self.bits) != self.outputs * words or len(self.starts) != self.outputs + 1 or int(self.starts[0]):
            raise ValueError(f"found {len(self.bits)} words and {len(self.starts)} starts: they do not fit the matrix")
        kept = self._mask()
        if bool(kept[:, self.inputs :].any()):
            raise ValueError(f"found a bit of an input behind the last of {self.inputs}")
        if not torch.equal(kept.sum(1), self.starts.diff()) or len(self.values) != int(self.starts[-1]) + _SPARE:
            raise ValueError(f"found {len(self.values)} values for {int(kept.sum())} bits: they do not fit")

    @classmethod
    def from_dense(cls, weight: Tensor) -> BitRows:
        """Take the entries of a matrix that are not zero, of either sign.

        Args:
            weight: (outputs, inputs) float32, bfloat16 or float16, on the CPU.

        Raises:
            ValueError: If the weight has another number of dimensions, dtype or device.
        """
        check_weight(weight)
        outputs, inputs = weight.shape
        kept = weight.detach() != 0
        count = -(-inputs // _WORD)
        padded = torch.zeros(outputs, count * _WORD, dtype=torch.int64)
        padded[:, :inputs] = kept
        words = (padded.view(outputs, count, _WORD) << torch.arange(_WORD)).sum(2)
        bits = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).view(-1)
        values = torch.cat([weight.detach()[kept], weight.new_zeros(_SPARE)])
        return cls(values, bits, starts_of(kept.sum(1)), outputs, inputs)

    def _mask(self) -> Tensor:
        """(outputs, words * 32) bool."""
        words = self.bits.view(self.outputs, -(-self.inputs // _WORD), 1)
        return (words >> torch.arange(_WORD, dtype=torch.int32) & 1).bool().view(self.outputs, words.shape[1] * _WORD)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.bits, self.starts))

    def to_dense(self) -> Tensor:
        """(outputs, inputs): the matrix, bit for bit but for negative zeros."""
        dense = self.values.new_zeros(self.outputs, self.inputs)
        dense[self._mask()[:, : self.inputs]] = self.values[:-_SPARE]
        return dense

    def linear(self, x: Tensor, bias: Tensor | None = None, level: str = "") -> Tensor:
        """``x @ weight.T + bias``; see :meth:`~hf_prune.kernels.sparse.sparse_rows.SparseRows.linear`."""
        product: Tensor = torch.ops.hf_prune.bits_linear(
            x, self.values, self.bits, self.starts, bias, self.outputs, self.inputs, level
        )
        return product
