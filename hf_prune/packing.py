"""One weight as bytes and back: where its values are, and the values themselves, bit for bit.

A packed weight describes itself: a small header, then sections. ``docs/format.md`` is the specification. Positions are
a bit for each weight, gaps between the ones that stay, or numbers of N:M patterns, whichever is shortest. With the
codec zstd, values are split into byte planes (all exponents, then all mantissas), since exponents hardly vary and
mantissas are noise: an entropy coder then comes near the entropy of both.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from hf_prune.errors import CheckpointError

CODECS = ("none", "zstd")
VALUES = ("exact", "int8")
_LAYOUTS = ("full", "bits", "gaps", "groups")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAGIC = b"hfp1"
_HEAD = struct.Struct("<4s10BxxQ")
_MAX_DIMENSIONS = 8
_ALIGNMENT = 8
# Nobody has to believe that a few bytes stand for a terabyte: writers pad to this, readers refuse what is beyond it.
MAX_EXPANSION = 1024
_ESCAPE = 255  # of a gap: that many zeros, and no value after them
_SPARSE = 1 / 16  # from this share of zeros on, positions are worth their bytes
_CHUNK = 1 << 16  # decoded at a time, so that positions stay in the cache
_LEVEL = 1  # higher ones look for repetitions, of which noise has none
_TABLE = 16  # a plane of at most so many different bytes is written two to a byte: Huffman codes have no half bits
_LEAST_PAIRED = 64  # values; with fewer, the length of a section would not tell how it is written


@dataclass(frozen=True)
class Header:
    """What a packed weight says of itself.

    Args:
        dtype: Of the weight.
        shape: Of the weight.
        layout: How positions are written: ``"full"``, ``"bits"``, ``"gaps"`` or ``"groups"``.
        kept: How many values are stored.
        masked: Whether the positions are a pruning mask, and not merely where values are not zero.
        codec: ``"zstd"`` or ``"none"``.
        values: ``"exact"`` or ``"int8"``, which is lossy.
        rotated: Whether the sign was moved from the first bit of a value to the last.
        transposed: Whether the values follow each other column by column.
        group: N and M of ``"groups"``, zeros otherwise.
        sections: First and last byte + 1 of each section: positions, scales of int8, values.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str
    kept: int
    masked: bool
    codec: str
    values: str
    rotated: bool
    transposed: bool
    group: tuple[int, int]
    sections: tuple[tuple[int, int], ...]

    @property
    def numel(self) -> int:
        """How many weights it stands for."""
        return math.prod(self.shape)

    @property
    def lossy(self) -> bool:
        """Whether the values are not those that were packed."""
        return self.values == "int8"


def pack(tensor: Tensor, mask: Tensor | None = None, *, codec: str = "zstd", values: str = "exact") -> np.ndarray:
    """A weight as bytes.

    Args:
        tensor: Any shape; float32, bfloat16, float16 or float64.
        mask: Like the tensor, True = keep; by default what is not +0.0 is kept.
        codec: ``"zstd"``, or ``"none"`` for sections that can be used where they lie in the file.
        values: ``"int8"`` rounds what stays to 255 steps for each index of the first dimension, if something was
            removed.

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
    head = _HEAD.pack(
        _MAGIC,
        CODECS.index(codec),
        _DTYPES.index(tensor.dtype),
        _LAYOUTS.index(layout),
        VALUES.index(values),
        mask is not None,
        rotated,
        transposed,
        *group,
        len(shape),
        kept,
    )
    head += struct.pack(f"<{len(shape) + len(sections)}Q", *shape, *map(len, sections))
    body = b"".join(part + bytes(-len(part) % _ALIGNMENT) for part in [head, *sections])
    missing = -(-tensor.nbytes // MAX_EXPANSION) - len(body)
    body += bytes(max(0, missing + -missing % _ALIGNMENT))
    return np.frombuffer(body, dtype=np.uint8)


def read_header(data: Any, size: int | None = None) -> Header:
    """Read and check what a packed weight says of itself, without reading its sections.

    Args:
        data: The packed weight, or its first ``header_size`` bytes or more.
        size: How many bytes it has in all; by default those given.

    Raises:
        CheckpointError: If it is damaged, or claims what its size does not bear out.
    """
    size = len(data) if size is None else size
    try:
        magic, codec, dtype, layout, values, masked, rotated, transposed, n, m, ndim, kept = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise _damaged(f"it begins with {bytes(magic)!r}, expected {_MAGIC!r}")
        if ndim > _MAX_DIMENSIONS:
            raise _damaged(f"it has {ndim} dimensions, expected at most {_MAX_DIMENSIONS}")
        count = 1 + _value_sections(CODECS[codec], VALUES[values], _DTYPES[dtype])
        numbers = struct.unpack_from(f"<{ndim + count}Q", data, _HEAD.size)
        names = _LAYOUTS[layout], CODECS[codec], VALUES[values]
    except (IndexError, struct.error) as error:
        raise _damaged(f"its header makes no sense: {error}") from error
    if max(masked, rotated, transposed) > 1:
        raise _damaged("its header has flags other than 0 and 1")
    sections, start = [], _aligned(_HEAD.size + 8 * len(numbers))
    for length in numbers[ndim:]:
        sections.append((start, start + length))
        start = _aligned(start + length)
    shape = numbers[:ndim]
    header = Header(
        _DTYPES[dtype],
        shape,
        names[0],
        kept,
        bool(masked),
        names[1],
        names[2],
        bool(rotated),
        bool(transposed),
        (n, m),
        tuple(sections),
    )
    if start > size:
        raise _damaged(f"its sections end at byte {start}, and it has {size}")
    dense = header.numel * header.dtype.itemsize
    if dense > size * MAX_EXPANSION:
        raise _damaged(f"{size} bytes claim to be a weight of shape {list(shape)}, {dense} bytes")
    _check_counts(header)
    return header


HEADER_BYTES = _HEAD.size + 8 * (_MAX_DIMENSIONS + 1 + 8)  # no header is longer


def unpack(data: np.ndarray, header: Header | None = None) -> Tensor:
    """The weight that :func:`pack` packed.

    Args:
        data: uint8, one-dimensional.
        header: What :func:`read_header` says of it, if it was called.

    Raises:
        CheckpointError: If it is damaged.
    """
    header = header or read_header(data)
    if header.layout == "full":
        flat = torch.from_numpy(_values(data, header)).view(header.dtype)
    elif header.lossy:
        flat = _from_int8(data, header)
    else:
        values = _values(data, header)
        out = np.zeros(header.numel, dtype=values.dtype)
        start = 0
        for first, where in _chunks(data, header):
            out[first:][where] = values[start : start + len(where)]
            start += len(where)
        flat = torch.from_numpy(out).view(header.dtype)
    return _shaped(flat, header)


def unpack_mask(data: np.ndarray, header: Header | None = None) -> Tensor:
    """Where values of a packed weight are stored: its mask, if it was packed with one.

    Args:
        data: uint8, one-dimensional.
        header: What :func:`read_header` says of it, if it was called.

    Raises:
        CheckpointError: If it is damaged.
    """
    header = header or read_header(data)
    if header.layout == "full":
        return torch.ones(header.shape, dtype=torch.bool)
    mask = np.zeros(header.numel, dtype=bool)
    for first, where in _chunks(data, header):
        mask[first:][where] = True
    return _shaped(torch.from_numpy(mask), header)


def _shaped(flat: Tensor, header: Header) -> Tensor:
    if header.transposed:
        return flat.view(header.shape[::-1]).t().contiguous()
    return flat.view(header.shape)


# --- the header ------------------------------------------------------------------------------------


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(f"a packed weight is damaged: {what}; download or save the checkpoint again")


def _aligned(position: int) -> int:
    return position + -position % _ALIGNMENT


def _value_sections(codec: str, values: str, dtype: torch.dtype) -> int:
    """Scales and values of int8; else one section for each byte of a value, or one in all."""
    return 2 if values == "int8" else dtype.itemsize if codec == "zstd" else 1


def _check_counts(header: Header) -> None:
    """Numbers that contradict each other, where the sections need not be read to see it."""
    n, m = header.group
    kept, numel = header.kept, header.numel
    fits = {
        "full": kept == numel and header.values == "exact" and not header.transposed,
        "bits": kept <= numel,
        "gaps": kept <= numel,
        "groups": 0 < n < m <= 16 and numel % m == 0 and kept == numel // m * n and math.comb(m, n) <= 256,
    }[header.layout]
    if not fits or (header.layout != "groups" and (n or m)) or (header.lossy and not header.shape):
        raise _damaged(f"{kept} values, layout {header.layout} of {n}:{m}, for a shape of {list(header.shape)}")
    if header.transposed and (header.layout != "groups" or len(header.shape) != 2):
        raise _damaged(f"a shape of {list(header.shape)} cannot be transposed")
    if header.codec == "none":
        expected = [*_lengths(header, header.sections[0][1] - header.sections[0][0])]
        found = [end - start for start, end in header.sections]
        if found != expected:
            raise _damaged(f"its sections have {found} bytes, expected {expected}")


def _lengths(header: Header, positions: int) -> list[int]:
    """How many bytes each section has when it is not compressed; of gaps it takes the number that is given."""
    if header.layout == "bits":
        positions = -(-header.numel // 8)
    elif header.layout == "full":
        positions = 0
    elif header.layout == "groups":
        per_byte = _pattern_table(*header.group).shape[0]  # (groups in a byte, ...)
        positions = -(-(header.numel // header.group[1]) // per_byte)
    if header.lossy:
        return [positions, 4 * _rows(header), header.kept]
    if header.codec == "none":
        return [positions, header.kept * header.dtype.itemsize]
    return [positions, *[header.kept] * header.dtype.itemsize]


def _rows(header: Header) -> int:
    return header.shape[-1 if header.transposed else 0]


def _section(data: np.ndarray, header: Header, index: int) -> np.ndarray:
    start, end = header.sections[index]
    part = data[start:end]
    if header.codec == "none" or (index == 0 and header.layout == "full"):
        return part
    try:
        # what the frame says it will become decides whether it is unpacked at all
        frame = part.data
        claimed = zstandard.frame_content_size(frame) if frame else -1
        if not _claim_fits(header, index, claimed):
            raise _damaged(f"section {index} claims to hold {claimed} bytes")
        return np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), dtype=np.uint8)
    except zstandard.ZstdError as error:
        raise _damaged(str(error)) from error


def _claim_fits(header: Header, index: int, claimed: int) -> bool:
    """Whether a section of so many bytes is what the header calls for."""
    if index == 0 and header.layout == "gaps":
        return header.kept <= claimed <= header.kept + header.numel // _ESCAPE
    if index > 0 and not header.lossy and header.kept >= _LEAST_PAIRED and claimed == _TABLE + -(-header.kept // 2):
        return True
    return claimed == _lengths(header, 0)[index]


def _squeeze(part: bytes | np.ndarray, codec: str) -> bytes:
    raw = part if isinstance(part, bytes) else part.tobytes()
    return raw if codec == "none" else zstandard.ZstdCompressor(level=_LEVEL).compress(raw)


# --- values ----------------------------------------------------------------------------------------


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
    if len(plane) < _LEAST_PAIRED or len(table) > _TABLE:
        return whole
    number = np.zeros(256, dtype=np.uint8)
    number[table] = np.arange(len(table))
    numbers = number[np.pad(plane, (0, len(plane) % 2), mode="edge")]
    head = np.pad(table.astype(np.uint8), (0, _TABLE - len(table)))
    paired = _squeeze(np.concatenate([head, numbers[::2] | numbers[1::2] << 4]), codec)
    return min(whole, paired, key=len)


def _read_plane(section: np.ndarray, kept: int) -> np.ndarray:
    if len(section) == kept:
        return section
    table, pairs = section[:_TABLE], section[_TABLE:]
    both = np.stack([table[np.arange(256) % 16], table[np.arange(256) // 16]], axis=1).view("<u2").reshape(-1)
    return both[pairs].view(np.uint8)[:kept]


def _values(data: np.ndarray, header: Header) -> np.ndarray:
    size = header.dtype.itemsize
    if header.codec == "none":
        return np.frombuffer(bytearray(_section(data, header, 1)), dtype=f"<u{size}")  # a copy that can be written
    joined = np.empty((header.kept, size), dtype=np.uint8)
    for i in range(size):
        joined[:, i] = _read_plane(_section(data, header, 1 + i), header.kept)
    values = joined.reshape(-1).view(f"<u{size}")
    if header.rotated:
        sign = values << values.dtype.type(8 * size - 1)
        values >>= values.dtype.type(1)
        values |= sign
    return values


def _to_int8(tensor: Tensor, keep: np.ndarray) -> list[np.ndarray]:
    """Scales, one for each index of the first dimension, and the values that stay in steps of them."""
    rows = tensor.detach().cpu().float().reshape(tensor.shape[0], -1)
    if not bool(rows.isfinite().all()):
        raise CheckpointError("it has values that are not finite, which int8 cannot hold: use values='exact'")
    scales = rows.abs().amax(1) / 127 if rows.numel() else torch.zeros(len(rows))
    steps = (rows / scales.where(scales > 0, 1.0).unsqueeze(1)).round_().to(torch.int8)
    return [scales.numpy(), steps.reshape(-1).numpy()[keep]]


def _from_int8(data: np.ndarray, header: Header) -> Tensor:
    scales = np.frombuffer(_section(data, header, 1).tobytes(), dtype="<f4")
    values = _section(data, header, 2).view(np.int8)
    steps = np.zeros(header.numel, dtype=np.int8)
    start = 0
    for first, where in _chunks(data, header):
        steps[first:][where] = values[start : start + len(where)]
        start += len(where)
    rows = torch.from_numpy(steps).view(len(scales), -1) if len(scales) else torch.from_numpy(steps)
    return (rows * torch.from_numpy(scales.copy()).unsqueeze(1)).to(header.dtype).view(-1)


# --- positions -------------------------------------------------------------------------------------


def _positions(keep: np.ndarray, group: tuple[int, int], codec: str) -> tuple[str, bytes]:
    if group != (0, 0):
        return "groups", _squeeze(_to_groups(keep, *group), codec)
    bits = _squeeze(np.packbits(keep), codec)
    gaps = _squeeze(_to_gaps(keep), codec)
    return ("gaps", gaps) if len(gaps) < len(bits) else ("bits", bits)


def _to_gaps(keep: np.ndarray) -> np.ndarray:
    """How many zeros stand before each value that stays; a byte of 255 is 255 of them, and no value yet."""
    gaps = np.diff(np.flatnonzero(keep), prepend=-1) - 1
    jumps = gaps // _ESCAPE
    out = np.full(len(gaps) + int(jumps.sum()), _ESCAPE, dtype=np.uint8)
    out[np.cumsum(jumps + 1) - 1] = gaps % _ESCAPE
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


@cache
def _pattern_table(n: int, m: int) -> np.ndarray:
    """Positions within a group by number of the pattern: (groups in a byte, patterns, n)."""
    patterns = np.array(list(itertools.combinations(range(m), n)), dtype=np.int64)
    groups = 1
    while len(patterns) ** (groups + 1) <= 256:
        groups += 1
    return patterns + m * np.arange(groups)[:, None, None]


def _to_groups(keep: np.ndarray, n: int, m: int) -> np.ndarray:
    """As many pattern numbers in a byte as it holds, the first one the least significant."""
    table = _pattern_table(n, m)
    groups, patterns, _ = table.shape
    number = np.zeros(1 << m, dtype=np.int64)
    number[(1 << table[0]).sum(1)] = np.arange(patterns)
    numbers = number[keep.reshape(-1, m) @ (1 << np.arange(m))]
    numbers = np.pad(numbers, (0, -len(numbers) % groups)).reshape(-1, groups)
    return (numbers @ (patterns ** np.arange(groups))).astype(np.uint8)


def _chunks(data: np.ndarray, header: Header) -> Any:
    """Offsets and, from there, positions of the values that are stored, in order, some at a time.

    Raises:
        CheckpointError: If there are more or fewer than the header says, or one is outside.
    """
    source = _section(data, header, 0)
    found = {"bits": _bit_chunks, "gaps": _gap_chunks, "groups": _group_chunks}[header.layout](source, header)
    left = header.kept
    for first, where in found:
        left -= len(where)
        if left < 0 or (len(where) and first + int(where[-1]) >= header.numel):
            break
        yield first, where
    else:
        if left == 0:
            return
    raise _damaged(f"its positions are not those of {header.kept} values among {header.numel}")


def _bit_chunks(source: np.ndarray, header: Header) -> Any:
    for start in range(0, len(source), _CHUNK // 8):
        yield 8 * start, np.flatnonzero(np.unpackbits(source[start : start + _CHUNK // 8]).view(bool))


def _gap_chunks(source: np.ndarray, header: Header) -> Any:
    first = 0
    for start in range(0, len(source), _CHUNK):
        gaps = source[start : start + _CHUNK]
        values = gaps != _ESCAPE
        after = np.cumsum(gaps + values, dtype=np.intp)  # 255 + 0 fits a byte, and so does 254 + 1
        where = after - 1
        yield first, where if values.all() else where[values]
        first += int(after[-1])


def _group_chunks(source: np.ndarray, header: Header) -> Any:
    table = _pattern_table(*header.group)
    groups, patterns, _ = table.shape
    numbers = np.arange(patterns**groups)
    in_byte = [table[i, numbers // patterns**i % patterns] for i in range(groups)]  # of (bytes, n)
    lookup = np.concatenate(in_byte, axis=1)  # (bytes, groups * n)
    width = groups * header.group[1]
    left = header.kept
    if len(source) and int(source.max()) >= len(lookup):
        raise _damaged(f"a byte is {int(source.max())}, expected less than {len(lookup)}")
    for start in range(0, len(source), _CHUNK // width):
        part = source[start : start + _CHUNK // width]
        where = lookup[part] + width * np.arange(len(part))[:, None]  # (bytes, groups * n)
        where = where.reshape(-1)[:left]
        left -= len(where)
        yield width * start, where
