"""What every way to compute a linear layer offers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor


class Kernel:
    """A way to compute ``x @ weight.T + bias``.

    Attributes:
        name: Its name in reports and records.
        reads_weight: Whether it reads the dense weight, which then stays in memory.
    """

    name: str
    reads_weight: ClassVar[bool] = False

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out)."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes that it holds besides the dense weight."""
        return 0

    def to_dense(self) -> Tensor | None:
        """The weight, bit for bit but for negative zeros, if it holds all of it."""
        return None
