"""Packs weights: where its values are, and the values themselves, bit for bit.

A packed weight describes itself: a small header, then sections. ``docs/format.md`` is the specification,
``unpacking.py`` reads it. Positions are a bit for each weight, gaps between the ones that stay, or numbers of N:M
patterns, whichever is shortest. With the codec zstd, values are split into byte planes (all exponents, then all
mantissas), since exponents hardly vary and mantissas are noise: an entropy coder then comes near the entropy of both.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
import zstandard
from torch import Tensor

from hf_prune.checkpoint.packed.format import (
    ALIGNMENT,
    CODECS,
    DTYPES,
    ESCAPE,
    HEAD,
    LAYOUTS,
    LEAST_PAIRED,
    MAGIC,
    MAX_EXPANSION,
    TABLE,
    VALUES,
    pattern_table,
)
from hf_prune.errors import CheckpointError

_SPARSE = 1 / 16  # from this share of zeros on, positions are worth their bytes
# With hardly a memory, and with one. Noise repeats itself by chance, briefly: to say so takes more bytes, and more time
# to read, than to spell it out. Rows that are the same are another matter.
_SETTINGS = [
    zstandard.ZstdCompressionParameters.from_level(1, hash_log=6),
    zstandard.ZstdCompressionParameters.from_level(1),
]


def pack(tensor: Tensor, mask: Tensor | None = None, *, codec: str = "zstd", values: str = "exact") -> np.ndarray:
    """A weight as bytes.

    Args:
        tensor: Any shape; float32, bfloat16, float16 or float64.
        mask: Like the tensor, True = keep; by default what is not +0.0 is kept.
        codec: ``"zstd"``, or ``"none"`` for sections that can be used where they lie in the file.
        values: ``"int8"`` rounds what stays to 255 steps for each index of the first dimension, if something was
            removed; of the second one where a matrix is stored column by column, as N:M patterns down its columns are.

    Returns:
        uint8, one-dimensional, of a length that 8 divides.

    Raises:
        CheckpointError: If the mask removes what is not +0.0, or ``"int8"`` is asked of values that are not finite.
    """
    bits = _bits(tensor)
    keep = (bits != 0) if mask is None else mask.cpu().numpy().reshape(-1)
    if mask is not None and bool(((bits != 0) > keep).any()):
        raise CheckpointError("its mask removes weights that are not +0.0: call apply_masks() and save it again")
    kept = int(np.count_nonzero(keep))
    sparse = kept < bits.size * (1 - _SPARSE) if mask is None else kept < bits.size
    if not sparse:
        kept = bits.size
    group, transposed = _find_groups(keep, tuple(tensor.shape)) if sparse else ((0, 0), False)
    if transposed:
        tensor, keep = tensor.t(), keep.reshape(tensor.shape).T.reshape(-1)
        bits = _bits(tensor)
    layout, where = _positions(keep, group, codec) if sparse else ("full", b"")
    sections, rotated = [where], False
    if values == "int8" and sparse:
        sections += [_squeeze(part, codec) for part in _to_int8(tensor, keep)]
    else:
        values = "exact"
        parts, rotated = _planes(bits[np.flatnonzero(keep)] if sparse else bits, codec)
        sections += parts
    shape = tuple(tensor.shape[::-1] if transposed else tensor.shape)
    head = HEAD.pack(
        MAGIC,
        CODECS.index(codec),
        DTYPES.index(tensor.dtype),
        LAYOUTS.index(layout),
        VALUES.index(values),
        mask is not None,
        rotated,
        transposed,
        *group,
        len(shape),
        kept,
    )
    head += struct.pack(f"<{len(shape) + len(sections)}Q", *shape, *map(len, sections))
    body = b"".join(part + bytes(-len(part) % ALIGNMENT) for part in [head, *sections])
    missing = -(-tensor.nbytes // MAX_EXPANSION) - len(body)
    body += bytes(max(0, missing + -missing % ALIGNMENT))
    return np.frombuffer(body, dtype=np.uint8)


def _squeeze(part: bytes | np.ndarray, codec: str) -> bytes:
    raw = part if isinstance(part, bytes) else part.tobytes()
    if codec == "none":
        return raw
    return min((zstandard.ZstdCompressor(compression_params=each).compress(raw) for each in _SETTINGS), key=len)


def _bits(tensor: Tensor) -> np.ndarray:
    """A tensor's values as unsigned integers, flat."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().view(f"<u{tensor.element_size()}")


def _planes(values: np.ndarray, codec: str) -> tuple[list[bytes], bool]:
    """The sections of exact values, and whether signs were moved, which is done where it saves bytes."""
    if codec == "none":
        return [values.tobytes()], False
    one = values.dtype.type(1)
    turned = (values << one) | (values >> values.dtype.type(8 * values.itemsize - 1))
    both = [
        [_plane(np.ascontiguousarray(plane), codec) for plane in form.view(np.uint8).reshape(-1, form.itemsize).T]
        for form in (values, turned)
    ]
    plain, rotated = (sum(map(len, parts)) for parts in both)
    return both[rotated < plain], rotated < plain


def _plane(plane: np.ndarray, codec: str) -> bytes:
    whole = _squeeze(plane, codec)
    table = np.flatnonzero(np.bincount(plane, minlength=256))
    if len(plane) < LEAST_PAIRED or len(table) > TABLE:
        return whole
    number = np.zeros(256, dtype=np.uint8)
    number[table] = np.arange(len(table))
    numbers = number[np.pad(plane, (0, len(plane) % 2), mode="edge")]
    head = np.pad(table.astype(np.uint8), (0, TABLE - len(table)))
    paired = _squeeze(np.concatenate([head, numbers[::2] | numbers[1::2] << 4]), codec)
    return min(whole, paired, key=len)


def _to_int8(tensor: Tensor, keep: np.ndarray) -> list[np.ndarray]:
    """Scales, one for each index of the first dimension, and the values that stay in steps of them."""
    rows = tensor.detach().cpu().float().reshape(tensor.shape[0], -1)
    if not bool(rows.isfinite().all()):
        raise CheckpointError("it has values that are not finite, which int8 cannot hold: use values='exact'")
    scales = rows.abs().amax(1) / 127 if rows.numel() else torch.zeros(len(rows))
    steps = (rows / scales.where(scales > 0, 1.0).unsqueeze(1)).round_().to(torch.int8)
    return [scales.numpy(), steps.reshape(-1).numpy()[keep]]


def _positions(keep: np.ndarray, group: tuple[int, int], codec: str) -> tuple[str, bytes]:
    if group != (0, 0):
        return "groups", _squeeze(_to_groups(keep, *group), codec)
    bits = _squeeze(np.packbits(keep), codec)
    gaps = _squeeze(_to_gaps(keep), codec)
    return ("gaps", gaps) if len(gaps) < len(bits) else ("bits", bits)


def _to_gaps(keep: np.ndarray) -> np.ndarray:
    """How many zeros stand before each value that stays; a byte of 255 is 255 of them, and no value yet."""
    gaps = np.diff(np.flatnonzero(keep), prepend=-1) - 1
    jumps = gaps // ESCAPE
    out = np.full(len(gaps) + int(jumps.sum()), ESCAPE, dtype=np.uint8)
    out[np.cumsum(jumps + 1) - 1] = gaps % ESCAPE
    return out


def _find_groups(keep: np.ndarray, shape: Sequence[int]) -> tuple[tuple[int, int], bool]:
    """N and M if each M in a row keep exactly N, and whether rows are the columns; (0, 0) if there is no such pair."""
    if len(shape) < 2 or not keep.size:
        return (0, 0), False
    views = [(keep.reshape(-1, shape[-1]), False)]
    if len(shape) == 2:
        views.append((keep.reshape(shape).T, True))
    for view, transposed in views:
        for m in (2, 4, 8, 16):
            if view.shape[1] % m == 0:
                n = int(np.count_nonzero(view[0, :m]))
                if not 0 < n < m or math.comb(m, n) > 256 or not _all_keep(view[0], n, m):
                    continue
                if _all_keep(view, n, m):
                    return (n, m), transposed
    return (0, 0), False


def _all_keep(keep: np.ndarray, n: int, m: int) -> bool:
    return bool((keep.reshape(-1, m).sum(1, dtype=np.uint8) == n).all())


def _to_groups(keep: np.ndarray, n: int, m: int) -> np.ndarray:
    """As many pattern numbers in a byte as it holds, the first one the least significant."""
    table = pattern_table(n, m)
    groups, patterns, _ = table.shape
    number = np.zeros(1 << m, dtype=np.int64)
    number[(1 << table[0]).sum(1)] = np.arange(patterns)
    numbers = number[keep.reshape(-1, m) @ (1 << np.arange(m))]
    numbers = np.pad(numbers, (0, -len(numbers) % groups)).reshape(-1, groups)
    return (numbers @ (patterns ** np.arange(groups))).astype(np.uint8)
