"""Pack a weight: the positions of its remaining values, and the values themselves, bit for bit.

A packed weight is a small header followed by sections. ``docs/format.md`` is the specification, and ``unpack.py`` the
reader. Positions are stored as one bit for each weight, as gaps between remaining weights, or as numbers of N:M
patterns, whichever is shortest. With zstd, values are split into byte planes (all exponents, then all mantissas):
exponents hardly vary and mantissas are noise, so an entropy coder comes near the entropy of both.
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

_SPARSE = 1 / 16  # with fewer zeros, positions take more bytes than they save
# The smaller result of two is kept. With hardly any memory, zstd does not find the short repetitions that noise has by
# chance, which cost more bytes and time than they save; with memory it finds rows that are equal.
_SETTINGS = [
    zstandard.ZstdCompressionParameters.from_level(1, hash_log=6),
    zstandard.ZstdCompressionParameters.from_level(1),
]


def pack(tensor: Tensor, mask: Tensor | None = None, *, codec: str = "zstd", values: str = "exact") -> np.ndarray:
    """Pack a weight into bytes.

    Args:
        tensor: Any shape; float32, bfloat16, float16 or float64.
        mask: Bool of the same shape, True = keep; by default all values but +0.0 are kept.
        codec: ``"zstd"``, or ``"none"`` for uncompressed sections.
        values: ``"int8"`` rounds the remaining values, if anything was removed, to 255 steps for each index of the
            first dimension, or of the second one for a matrix stored by columns, as with N:M patterns along columns.

    Returns:
        uint8, one-dimensional, with a length divisible by 8.

    Raises:
        CheckpointError: If the mask removes values other than +0.0, or values for ``"int8"`` are not finite.
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
        sections += [_compress(part, codec) for part in _to_int8(tensor, keep)]
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


def _compress(part: bytes | np.ndarray, codec: str) -> bytes:
    raw = part if isinstance(part, bytes) else part.tobytes()
    if codec == "none":
        return raw
    return min((zstandard.ZstdCompressor(compression_params=settings).compress(raw) for settings in _SETTINGS), key=len)


def _bits(tensor: Tensor) -> np.ndarray:
    """The values of a tensor as flat unsigned integers."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().view(f"<u{tensor.element_size()}")


def _planes(values: np.ndarray, codec: str) -> tuple[list[bytes], bool]:
    """The sections of exact values, and whether signs were moved to the last bit because that saves bytes."""
    if codec == "none":
        return [values.tobytes()], False
    one = values.dtype.type(1)
    rotated_values = (values << one) | (values >> values.dtype.type(8 * values.itemsize - 1))
    both = [
        [_plane(np.ascontiguousarray(plane), codec) for plane in form.view(np.uint8).reshape(-1, form.itemsize).T]
        for form in (values, rotated_values)
    ]
    plain, rotated = (sum(map(len, parts)) for parts in both)
    return both[rotated < plain], rotated < plain


def _plane(plane: np.ndarray, codec: str) -> bytes:
    """Compress a byte plane, as a table and pairs of numbers if it has few different bytes and that is shorter."""
    whole = _compress(plane, codec)
    table = np.flatnonzero(np.bincount(plane, minlength=256))
    if len(plane) < LEAST_PAIRED or len(table) > TABLE:
        return whole
    number = np.zeros(256, dtype=np.uint8)
    number[table] = np.arange(len(table))
    numbers = number[np.pad(plane, (0, len(plane) % 2), mode="edge")]
    head = np.pad(table.astype(np.uint8), (0, TABLE - len(table)))
    paired = _compress(np.concatenate([head, numbers[::2] | numbers[1::2] << 4]), codec)
    return min(whole, paired, key=len)


def _to_int8(tensor: Tensor, keep: np.ndarray) -> list[np.ndarray]:
    """The scale for each index of the first dimension, and the remaining values in steps of it."""
    rows = tensor.detach().cpu().float().reshape(tensor.shape[0], -1)
    if not bool(rows.isfinite().all()):
        raise CheckpointError("it has values that are not finite, which int8 cannot hold: use values='exact'")
    scales = rows.abs().amax(1) / 127 if rows.numel() else torch.zeros(len(rows))
    steps = (rows / scales.where(scales > 0, 1.0).unsqueeze(1)).round_().to(torch.int8)
    return [scales.numpy(), steps.reshape(-1).numpy()[keep]]


def _positions(keep: np.ndarray, group: tuple[int, int], codec: str) -> tuple[str, bytes]:
    if group != (0, 0):
        return "groups", _compress(_to_groups(keep, *group), codec)
    bits = _compress(np.packbits(keep), codec)
    gaps = _compress(_to_gaps(keep), codec)
    return ("gaps", gaps) if len(gaps) < len(bits) else ("bits", bits)


def _to_gaps(keep: np.ndarray) -> np.ndarray:
    """The number of zeros before each remaining value; a byte of 255 stands for 255 zeros and no value."""
    gaps = np.diff(np.flatnonzero(keep), prepend=-1) - 1
    jumps = gaps // ESCAPE
    out = np.full(len(gaps) + int(jumps.sum()), ESCAPE, dtype=np.uint8)
    out[np.cumsum(jumps + 1) - 1] = gaps % ESCAPE
    return out


def _find_groups(keep: np.ndarray, shape: Sequence[int]) -> tuple[tuple[int, int], bool]:
    """Find N and M such that every M weights in a row keep N, along rows or else columns (True); (0, 0) if none."""
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
    """Whether every M weights in a row keep exactly N."""
    return bool((keep.reshape(-1, m).sum(1, dtype=np.uint8) == n).all())


def _to_groups(keep: np.ndarray, n: int, m: int) -> np.ndarray:
    """The pattern numbers, as many in a byte as fit, the first one as the least significant."""
    table = pattern_table(n, m)
    groups, patterns, _ = table.shape
    number = np.zeros(1 << m, dtype=np.int64)
    number[(1 << table[0]).sum(1)] = np.arange(patterns)
    numbers = number[keep.reshape(-1, m) @ (1 << np.arange(m))]
    numbers = np.pad(numbers, (0, -len(numbers) % groups)).reshape(-1, groups)
    return (numbers @ (patterns ** np.arange(groups))).astype(np.uint8)
