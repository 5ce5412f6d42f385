"""The one canonical (out, in) matrix of a weight, whatever its layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 18  # weights in one step


@dataclass(frozen=True)
class Target:
    """One weight that is to be pruned.

    Args:
        name: The parameter's name in ``model.named_parameters()``.
        module: The name of its module.
        layout: ``"linear"`` (out, in), ``"conv1d"`` (in, out) or ``"conv"`` (out, in, *kernel).
        shape: The parameter's shape.
    """

    name: str
    module: str
    layout: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of the canonical matrix."""
        if self.layout == "conv1d":
            return self.shape[1], self.shape[0]
        return self.shape[0], self.size // self.shape[0]

    @property
    def inputs(self) -> int:
        """The number of input features or channels: so many consecutive columns belong to one kernel position."""
        return self.shape[0] if self.layout == "conv1d" else self.shape[1]

    def matrix(self, tensor: Tensor) -> Tensor:
        """The canonical (out, in) matrix of a tensor shaped like the weight; a view where possible."""
        if self.layout == "conv1d":
            return tensor.t()
        if self.layout == "conv":
            return tensor.movedim(1, -1).reshape(self.matrix_shape)  # (out, *kernel, in) -> (out, kernel * in)
        return tensor

    def native(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`: a contiguous tensor in the layout of the weight."""
        if self.layout == "conv1d":
            return matrix.t().contiguous()
        if self.layout == "conv":
            channels_last = matrix.reshape(self.shape[0], *self.shape[2:], self.shape[1])
            return channels_last.movedim(-1, 1).contiguous()
        return matrix.contiguous()


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity: one fast sum, and every element only if that overflows."""
    if tensor.device.type == "cpu" and tensor.dim() > 1 and tensor.numel() > _CHUNK and tensor.element_size() < 4:
        rows = max(1, _CHUNK * len(tensor) // tensor.numel())
        return all(is_finite(part) for part in tensor.split(rows))  # the sum makes a copy in float32
    total = tensor.sum(dtype=torch.float32 if tensor.element_size() < 4 else None)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def output_rows(output: Tensor, layout: str) -> Tensor:
    """The output of a module as a matrix: (tokens, out), a row for each row of its inputs.

    Args:
        output: (..., out), or (batch, out, *size) of a convolution.
        layout: As in :class:`Target`.
    """
    if layout == "conv":
        output = output.movedim(1, -1)  # (batch, *positions, out)
    return output.reshape(-1, output.shape[-1])
