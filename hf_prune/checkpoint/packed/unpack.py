"""Unpack weights, bit for bit, in small parts. Like ``format.py``, this code is also written into checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from hf_prune.checkpoint.packed.format import ESCAPE, TABLE, Header, claim_fits, damaged, pattern_table, read_header

_CHUNK = 1 << 16  # weights decoded at a time, so that positions stay in the cache
_AT_ONCE = 1 << 20  # bytes; larger sections are decompressed as a stream, since allocating their memory takes longer
_WINDOW = 1 << 23  # bytes of history for a stream, as RFC 8878 recommends; ours need half a megabyte


def unpack(data: np.ndarray, header: Header | None = None) -> Tensor:
    """Unpack a weight that :func:`pack` packed. Besides the result, this takes the memory of small parts only.

    Args:
        data: The packed weight, one-dimensional uint8.
        header: Its header, if it was read before.

    Returns:
        The weight, in its dtype and shape.

    Raises:
        CheckpointError: If it is damaged.
    """
    header = header or read_header(data)
    # Allocated by numpy, which uses large pages: getting small ones, as torch does, takes longer than filling them.
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
    """Unpack only the positions of stored values: the mask of a weight that was packed with one.

    Args:
        data: The packed weight, one-dimensional uint8.
        header: Its header, if it was read before.

    Returns:
        Bool, in the shape of the weight, True = kept.

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
    """Write stored values to their positions in a weight. Transposing afterwards would take its memory twice."""
    if header.transposed:
        columns, rows = np.divmod(where + first, header.shape[0])
        out[rows * header.shape[1] + columns] = values
    else:
        out[first:][where] = values


def _section(data: np.ndarray, header: Header, index: int) -> tuple[int, Callable[[int], np.ndarray]]:
    """The uncompressed size of a section, and a function that reads its next bytes."""
    start, end = header.sections[index]
    section = data[start:end]
    if header.codec == "none" or (index == 0 and header.layout == "full"):
        return len(section), _slices(section)
    try:
        # The frame states its uncompressed size: refuse a wrong one before anything is decompressed.
        claimed = zstandard.frame_content_size(section.data) if len(section) else -1
        if not claim_fits(header, index, claimed):
            raise damaged(f"section {index} claims to hold {claimed} bytes")
        if claimed <= _AT_ONCE:
            return claimed, _slices(
                np.frombuffer(zstandard.ZstdDecompressor().decompress(section.data), dtype=np.uint8)
            )
    except zstandard.ZstdError as error:
        raise damaged(str(error)) from error
    frame = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(section.data)

    def read(count: int) -> np.ndarray:
        part = np.empty(count, dtype=np.uint8)
        try:
            if frame.readinto(part.data) == count:
                return part
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
    """A function that reads one byte of each of the next values, from a plain plane or from pairs of numbers."""
    length, read = _section(data, header, index)
    if length == header.kept:
        return read
    table = read(TABLE)
    both = np.stack([table[np.arange(256) % 16], table[np.arange(256) // 16]], axis=1).view("<u2").reshape(-1)
    spare = table[:0]  # the second byte of a pair whose first byte was read already

    def read_pairs(count: int) -> np.ndarray:
        nonlocal spare
        pairs = read((count - len(spare) + 1) // 2)
        plane = np.concatenate([spare, np.take(both, pairs, mode="clip").view(np.uint8)])
        spare = plane[count:]
        return plane[:count]

    return read_pairs


def _value_reader(data: np.ndarray, header: Header) -> Callable[[np.ndarray], np.ndarray]:
    """A function that reads the next stored values into an array, or returns them where they are stored unchanged."""
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
    """A function that reads the next stored values, given their positions: steps times the scale of the row."""
    length, read_scales = _section(data, header, 1)
    _, read_steps = _section(data, header, 2)
    count = length // 4
    scales, end = np.empty(0, dtype="<f4"), 0  # scales of some rows, and the first row after them

    def scales_of(rows: np.ndarray) -> np.ndarray:
        nonlocal scales, end
        result, start = np.empty(len(rows), dtype=np.float32), 0
        while start < len(rows):
            if rows[start] >= end:
                scales = read_scales(4 * min(_CHUNK, count - end)).view("<f4")
                end += len(scales)
            stop = int(np.searchsorted(rows, end))
            result[start:stop] = scales[rows[start:stop] - (end - len(scales))]
            start = stop
        return result

    def read(positions: np.ndarray) -> np.ndarray:
        steps = read_steps(len(positions)).view(np.int8).astype(np.float32)
        values = torch.from_numpy(steps).mul_(torch.from_numpy(scales_of(positions // (header.numel // count))))
        return values.to(header.dtype).view(torch.uint8).numpy().view(_integers(header))

    return read


def _group_width(header: Header) -> int:
    """The number of weights in a byte of patterns."""
    return header.group[1] * len(pattern_table(*header.group))


def _chunks(data: np.ndarray, header: Header) -> Any:
    """The positions of stored values in order, in parts.

    Yields:
        An offset, and positions counted from it.

    Raises:
        CheckpointError: If their number differs from the header, or a position is out of range.
    """
    length, read = _section(data, header, 0)
    step = _CHUNK // (_group_width(header) if header.layout == "groups" else {"bits": 8, "gaps": 1}[header.layout])
    parts = (read(min(step, length - start)) for start in range(0, length, step))
    decode = {"bits": _bit_chunks, "gaps": _gap_chunks, "groups": _group_chunks}[header.layout]
    remaining = header.kept
    for first, where in decode(parts, header):
        remaining -= len(where)
        if remaining < 0 or (len(where) and first + int(where[-1]) >= header.numel):
            break
        yield first, where
    else:
        if remaining == 0:
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
        after = np.cumsum(gaps + values, dtype=np.intp)  # no overflow: 255 + 0 and 254 + 1 fit a byte
        where = after - 1
        yield first, where if values.all() else where[values]
        first += int(after[-1])


def _group_chunks(parts: Iterable[np.ndarray], header: Header) -> Any:
    table = pattern_table(*header.group)
    groups, patterns, _ = table.shape
    numbers = np.arange(patterns**groups)
    in_byte = [table[i, numbers // patterns**i % patterns] for i in range(groups)]  # each (bytes, n)
    lookup = np.concatenate(in_byte, axis=1)  # (bytes, groups * n)
    width = _group_width(header)
    starts = np.repeat(width * np.arange(_CHUNK // width), lookup.shape[1])
    remaining = header.kept
    first = 0
    for part in parts:
        if int(part.max()) >= len(lookup):
            raise damaged(f"a byte is {int(part.max())}, expected less than {len(lookup)}")
        # The indices are in range; mode "clip" only saves numpy a buffer.
        where = np.take(lookup, part, axis=0, mode="clip").reshape(-1)
        where += starts[: len(where)]
        where = where[:remaining]
        remaining -= len(where)
        yield first, where
        first += width * len(part)
