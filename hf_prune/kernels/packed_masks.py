"""Masks as they are kept: one bit a weight, unpacked one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_prune.errors import MaskError

_BITS = 8  # in a byte, the highest one first


@dataclass(frozen=True, eq=False)
class PackedMask:
    """A bool tensor as bits.

    Args:
        bits: (ceil(weights / 8),) uint8.
        shape: Of the mask.
    """

    bits: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, mask: Tensor) -> PackedMask:
        """Pack a bool tensor, on its device.

        Raises:
            MaskError: If it is of another dtype.
        """
        if mask.dtype is not torch.bool:
            raise MaskError(
                f"a mask of dtype {str(mask.dtype).removeprefix('torch.')} was found: expected bool, True = keep; "
                f"compare it first, as in mask != 0"
            )
        return cls(_pack(mask.detach().reshape(-1)), mask.shape)

    @property
    def device(self) -> torch.device:
        """Where the bits are."""
        return self.bits.device

    def numel(self) -> int:
        """How many weights the mask is for."""
        return math.prod(self.shape)

    def to(self, device: torch.device) -> PackedMask:
        """The mask on a device; itself if it is there."""
        return self if self.device == device else PackedMask(self.bits.to(device), self.shape)

    def equals(self, other: PackedMask) -> bool:
        """Whether two masks are the same, wherever they lie."""
        return self.shape == other.shape and torch.equal(self.bits, other.bits.to(self.device))

    def common(self, other: PackedMask) -> PackedMask:
        """What both of two masks of a shape keep, on the device of the first."""
        return PackedMask(self.bits & other.bits.to(self.device), self.shape)

    def part(self, start: int, stop: int) -> Tensor:
        """Some values of the flat mask, of which the first one is a multiple of 8: (stop - start,) bool."""
        return _unpack(self.bits[start // _BITS : (stop + _BITS - 1) // _BITS], stop - start)

    def unpacked(self) -> Tensor:
        """The bool tensor; a new one each time."""
        return _unpack(self.bits, self.numel()).view(self.shape)

    def kept(self) -> int:
        """How many values are True."""
        if self.device.type == "cpu":
            return int(np.bitwise_count(self.bits.numpy()).sum(dtype=np.int64))
        return int(self.unpacked().count_nonzero())


class PackedMasks(MutableMapping[str, Tensor]):
    """Masks by name: a dict whose values are kept as bits, and unpacked, as new tensors, when they are asked for.

    Args:
        masks: Bool tensors; of another such mapping, the bits are shared.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self.packed: dict[str, PackedMask] = {}
        self.update(masks or {})

    @classmethod
    def sharing(cls, packed: Mapping[str, PackedMask]) -> PackedMasks:
        """A mapping of masks that are bits already."""
        masks = cls()
        masks.packed.update(packed)
        return masks

    def __getitem__(self, name: str) -> Tensor:
        return self.packed[name].unpacked()

    def __setitem__(self, name: str, mask: Tensor) -> None:
        self.packed[name] = PackedMask.of(mask)

    def __delitem__(self, name: str) -> None:
        del self.packed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)

    def __contains__(self, name: object) -> bool:
        return name in self.packed

    def update(self, other: Any = (), /, **others: Tensor) -> None:
        """As of a dict; bits of another mapping of packed masks are shared."""
        if (packed := packed_in(other)) is not None:
            self.packed.update(packed)
            other = ()
        super().update(other, **others)

    def __or__(self, other: Mapping[str, Tensor]) -> PackedMasks:
        joined = PackedMasks(self)
        joined.update(other)
        return joined

    def __ror__(self, other: Mapping[str, Tensor]) -> PackedMasks:
        return PackedMasks(other) | self

    def __ior__(self, other: Mapping[str, Tensor]) -> PackedMasks:
        self.update(other)
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        if packed_in(other) is None and not all(_is_mask(value) for value in other.values()):
            return NotImplemented
        if self.keys() != other.keys():
            return False
        others = PackedMasks(other).packed
        return all(mask is others[name] or mask.equals(others[name]) for name, mask in self.packed.items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}: {tuple(m.shape)}' for n, m in self.packed.items())})"

    def clear(self) -> None:
        """Remove all."""
        self.packed.clear()


def _is_mask(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.bool


def packed_in(masks: object) -> Mapping[str, PackedMask] | None:
    """The bits of a mapping of masks; None if it does not hold any."""
    return masks.packed if isinstance(masks, PackedMasks) else None


def mask_shape(masks: Mapping[str, Tensor], name: str) -> torch.Size:
    """The shape of a mask, without unpacking it."""
    packed = packed_in(masks)
    return masks[name].shape if packed is None else packed[name].shape


def _pack(mask: Tensor) -> Tensor:
    """(weights,) bool to (ceil(weights / 8),) uint8."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy()))
    padded = torch.nn.functional.pad(mask, (0, -len(mask) % _BITS)).view(-1, _BITS)
    packed = torch.zeros(len(padded), dtype=torch.uint8, device=mask.device)
    for place in range(_BITS):
        packed += padded[:, place].to(torch.uint8) << (_BITS - 1 - place)
    return packed


def _unpack(bits: Tensor, count: int) -> Tensor:
    """The inverse, of the first ``count`` weights."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).view(np.bool_))
    places = torch.arange(_BITS - 1, -1, -1, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> places) & 1).view(-1)[:count].bool()
