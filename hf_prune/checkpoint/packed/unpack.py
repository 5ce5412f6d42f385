"""Unpacks weights, bit for bit, a piece at a time. Like ``packed_format.py`` it travels with checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from hf_prune.checkpoint.packed.format import ESCAPE, TABLE, Header, claim_fits, damaged, pattern_table, read_header

_CHUNK = 1 << 16  # decoded at a time, so that positions stay in the cache
_AT_ONCE = 1 << 20  # bytes of a section that are decompressed in one piece: new memory for more takes longer to get
_WINDOW = 1 << 23  # bytes that zstd may keep of a longer one, as RFC 8878 recommends; ours need half a megabyte


def unpack(data: np.ndarray, header: Header | None = None) -> Tensor:
    """The weight that :func:`pack` packed; beside it, unpacking takes the memory of pieces.

    Args:
        data: uint8, one-dimensional.
        header: What :func:`read_header` says of it, if it was called.

    Raises:
        CheckpointError: If it is damaged.
    """
    header = header or read_header(data)
    # numpy asks for large pages where torch does not, and to get small ones takes longer than to fill them
    make = np.empty if header.layout == "full" else np.zeros
    out = make(header.numel, dtype=_integers(header))
    if header.lossy:
        read_at = _int8_reader(data, header)
        for first, where in _chunks(data, header):
            _put(out, header, first, where, read_at(where + first))
    elif header.layout == "full":
        read = _value_reader(data, header)
        for start in range(0, header.numel, _CHUNK):
            part = out[start : start + _CHUNK]
            if (values := read(part)) is not part:
                part[:] = values
    else:
        read = _value_reader(data, header)
        space = np.empty(min(_CHUNK, header.kept), dtype=out.dtype)
        for first, where in _chunks(data, header):
            _put(out, header, first, where, read(space[: len(where)]))
    return torch.from_numpy(out.view(np.uint8)).view(header.dtype).view(header.shape)


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
        _put(mask, header, first, where, True)
    return torch.from_numpy(mask).view(header.shape)


def _put(out: np.ndarray, header: Header, first: int, where: np.ndarray, values: Any) -> None:
    """Write stored values to where they are in a weight, row by row; transposing it later would take it twice."""
    if header.transposed:
        columns, rows = np.divmod(where + first, header.shape[0])
        out[rows * header.shape[1] + columns] = values
    else:
        out[first:][where] = values


def _section(data: np.ndarray, header: Header, index: int) -> tuple[int, Callable[[int], np.ndarray]]:
    """How many bytes a section holds, and what reads so many of them on from where it stopped."""
    start, end = header.sections[index]
    part = data[start:end]
    if header.codec == "none" or (index == 0 and header.layout == "full"):
        return len(part), _slices(part)
    try:
        # what the frame says it will become decides whether it is unpacked at all
        claimed = zstandard.frame_content_size(part.data) if len(part) else -1
        if not claim_fits(header, index, claimed):
            raise damaged(f"section {index} claims to hold {claimed} bytes")
        if claimed <= _AT_ONCE:
            return claimed, _slices(np.frombuffer(zstandard.ZstdDecompressor().decompress(part.data), dtype=np.uint8))
    except zstandard.ZstdError as error:
        raise damaged(str(error)) from error
    frame = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(part.data)

    def read(count: int) -> np.ndarray:
        found = np.empty(count, dtype=np.uint8)
        try:
            if frame.readinto(found.data) == count:
                return found
        except zstandard.ZstdError as error:
            raise damaged(str(error)) from error
        raise damaged(f"section {index} ends early")

    return claimed, read


def _slices(content: np.ndarray) -> Callable[[int], np.ndarray]:
    start = 0

    def read(count: int) -> np.ndarray:
        nonlocal start
        start += count
        return content[start - count : start]

    return read


def _integers(header: Header) -> np.dtype[Any]:
    return np.dtype(f"<u{header.dtype.itemsize}")


def _plane_reader(data: np.ndarray, header: Header, index: int) -> Callable[[int], np.ndarray]:
    """Reads one byte of each value, of so many values on from where it stopped."""
    length, read = _section(data, header, index)
    if length == header.kept:
        return read
    table = read(TABLE)
    both = np.stack([table[np.arange(256) % 16], table[np.arange(256) // 16]], axis=1).view("<u2").reshape(-1)
    spare = table[:0]  # the second byte of a pair of which the first was read

    def read_pairs(count: int) -> np.ndarray:
        nonlocal spare
        pairs = read((count - len(spare) + 1) // 2)
        found = np.concatenate([spare, np.take(both, pairs, mode="clip").view(np.uint8)])
        spare = found[count:]
        return found[:count]

    return read_pairs


def _value_reader(data: np.ndarray, header: Header) -> Callable[[np.ndarray], np.ndarray]:
    """Reads as many stored values as an array has room for, into it unless they can be had as they are."""
    kind = _integers(header)
    if header.codec == "none":
        _, stored = _section(data, header, 1)
        return lambda values: stored(values.nbytes).view(kind)
    planes = [_plane_reader(data, header, 1 + i) for i in range(kind.itemsize)]
    space = np.empty(min(_CHUNK, header.kept), dtype=kind)

    def join(values: np.ndarray) -> np.ndarray:
        values[:] = planes[-1](len(values))
        for plane in planes[-2::-1]:
            values <<= kind.type(8)
            values |= plane(len(values))
        if header.rotated:
            signs = np.left_shift(values, kind.type(8 * kind.itemsize - 1), out=space[: len(values)])
            values >>= kind.type(1)
            values |= signs
        return values

    return join


def _int8_reader(data: np.ndarray, header: Header) -> Callable[[np.ndarray], np.ndarray]:
    """Reads the stored values on from where it stopped, by their positions: each is a step times the row's scale."""
    length, read_scales = _section(data, header, 1)
    _, read_steps = _section(data, header, 2)
    count = length // 4
    scales, end = np.empty(0, dtype="<f4"), 0  # of some rows, and the first row after these

    def scales_of(rows: np.ndarray) -> np.ndarray:
        nonlocal scales, end
        found, start = np.empty(len(rows), dtype=np.float32), 0
        while start < len(rows):
            if rows[start] >= end:
                scales = read_scales(4 * min(_CHUNK, count - end)).view("<f4")
                end += len(scales)
            stop = int(np.searchsorted(rows, end))
            found[start:stop] = scales[rows[start:stop] - (end - len(scales))]
            start = stop
        return found

    def read(positions: np.ndarray) -> np.ndarray:
        steps = read_steps(len(positions)).view(np.int8).astype(np.float32)
        values = torch.from_numpy(steps).mul_(torch.from_numpy(scales_of(positions // (header.numel // count))))
        return values.to(header.dtype).view(torch.uint8).numpy().view(_integers(header))

    return read


def _group_width(header: Header) -> int:
    """How many weights a byte of patterns stands for."""
    return header.group[1] * len(pattern_table(*header.group))


def _chunks(data: np.ndarray, header: Header) -> Any:
    """Offsets and, from there, positions of the values that are stored, in order, some at a time.

    Raises:
        CheckpointError: If there are more or fewer than the header says, or one is outside.
    """
    length, read = _section(data, header, 0)
    step = _CHUNK // (_group_width(header) if header.layout == "groups" else {"bits": 8, "gaps": 1}[header.layout])
    parts = (read(min(step, length - start)) for start in range(0, length, step))
    found = {"bits": _bit_chunks, "gaps": _gap_chunks, "groups": _group_chunks}[header.layout](parts, header)
    left = header.kept
    for first, where in found:
        left -= len(where)
        if left < 0 or (len(where) and first + int(where[-1]) >= header.numel):
            break
        yield first, where
    else:
        if left == 0:
            return
    raise damaged(f"its positions are not those of {header.kept} values among {header.numel}")


def _bit_chunks(parts: Iterable[np.ndarray], header: Header) -> Any:
    first = 0
    for part in parts:
        yield first, np.flatnonzero(np.unpackbits(part).view(bool))
        first += 8 * len(part)


def _gap_chunks(parts: Iterable[np.ndarray], header: Header) -> Any:
    first = 0
    for gaps in parts:
        values = gaps != ESCAPE
        after = np.cumsum(gaps + values, dtype=np.intp)  # 255 + 0 fits a byte, and so does 254 + 1
        where = after - 1
        yield first, where if values.all() else where[values]
        first += int(after[-1])


def _group_chunks(parts: Iterable[np.ndarray], header: Header) -> Any:
    table = pattern_table(*header.group)
    groups, patterns, _ = table.shape
    numbers = np.arange(patterns**groups)
    in_byte = [table[i, numbers // patterns**i % patterns] for i in range(groups)]  # of (bytes, n)
    lookup = np.concatenate(in_byte, axis=1)  # (bytes, groups * n)
    width = _group_width(header)
    starts = np.repeat(width * np.arange(_CHUNK // width), lookup.shape[1])
    left = header.kept
    first = 0
    for part in parts:
        if int(part.max()) >= len(lookup):
            raise damaged(f"a byte is {int(part.max())}, expected less than {len(lookup)}")
        # indices are in range, and "clip" spares a buffer
        where = np.take(lookup, part, axis=0, mode="clip").reshape(-1)
        where += starts[: len(where)]
        where = where[:left]
        left -= len(where)
        yield first, where
        first += width * len(part)
