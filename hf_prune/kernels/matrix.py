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
        layout: Of each slab: ``"linear"`` (out, in), ``"conv1d"`` (in, out) or ``"conv"`` (out, in, *kernel).
        shape: The parameter's shape.
        slabs: How many matrices lie in the parameter one after the other, each with inputs of its own: the experts of
            a packed parameter, the groups of a convolution.
        transposed: Whether it is a transposed convolution: (in, out, *kernel), the inputs of one group after the other.
    """

    name: str
    module: str
    layout: str
    shape: tuple[int, ...]
    slabs: int = 1
    transposed: bool = False

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def slab_shape(self) -> tuple[int, int]:
        """(out, in) of the canonical matrix of each slab."""
        size, shape = self.size // self.slabs, self.shape
        if self.layout == "conv":
            out = shape[1] if self.transposed else shape[0] // self.slabs
        elif self.slabs == 1 and shape[0] > 1:  # further dimensions, such as heads, belong to the second one
            out = shape[0] if self.layout == "linear" else size // shape[0]
        else:
            out = size // shape[-1] if self.layout == "linear" else shape[-1]
        return out, size // out

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(slabs * out, in) of the canonical matrix, in which the slabs lie one above the other."""
        out, inputs = self.slab_shape
        return self.slabs * out, inputs

    @property
    def inputs(self) -> int:
        """The number of input features or channels: so many consecutive columns belong to one kernel position."""
        if self.layout != "conv":
            return self.slab_shape[1]
        return self.shape[0] // self.slabs if self.transposed else self.shape[1]

    @property
    def label(self) -> str:
        """What users call it: its module, or the parameter where the module may have several."""
        return self.module if self.name.rpartition(".")[2] == "weight" else self.name

    def rows(self, slab: int) -> slice:
        """The rows of one slab in the canonical matrix."""
        out = self.slab_shape[0]
        return slice(slab * out, (slab + 1) * out)

    def slab(self, number: int) -> Target:
        """One slab as a target by itself, whose canonical matrix is a part of this one's."""
        out, inputs = self.slab_shape
        if self.slabs == 1:
            return self
        name = f"{self.name}[{number}]"
        if self.layout == "conv":
            return Target(name, self.module, "conv", (out, self.inputs, *self.shape[2:]))
        return Target(name, self.module, "linear", (out, inputs))

    def matrix(self, tensor: Tensor) -> Tensor:
        """The canonical (slabs * out, in) matrix of a tensor shaped like the weight; a view where possible."""
        if self.transposed:
            tensor = tensor.unflatten(0, (self.slabs, -1)).transpose(1, 2).flatten(0, 1)  # (out, in, *kernel)
        if self.layout == "conv":
            return tensor.movedim(1, -1).reshape(self.matrix_shape)  # (out, *kernel, in) -> (out, kernel * in)
        if self.layout == "conv1d":
            out, inputs = self.slab_shape
            tensor = tensor.reshape(self.slabs, inputs, out).mT  # (slabs, out, in)
        return tensor.reshape(self.matrix_shape)

    def native(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`: a contiguous tensor in the layout of the weight."""
        if self.layout == "conv":
            channels_last = matrix.reshape(self.matrix_shape[0], *self.shape[2:], self.inputs)
            weight = channels_last.movedim(-1, 1)  # (out, in, *kernel)
            if self.transposed:
                weight = weight.unflatten(0, (self.slabs, -1)).transpose(1, 2).flatten(0, 1)
            return weight.contiguous()
        if self.layout == "conv1d":
            matrix = matrix.reshape(self.slabs, *self.slab_shape).mT  # (slabs, in, out)
        return matrix.reshape(self.shape).contiguous()


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity: one fast sum, and every element only if that overflows."""
    if tensor.device.type == "cpu" and tensor.dim() > 1 and tensor.numel() > _CHUNK and tensor.element_size() < 4:
        if len(tensor) == 1:  # such as one expert of a packed parameter
            return is_finite(tensor[0])
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
