"""Read the values of packed weights, some at a time. Like ``format.py``, this code is also written into checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import zstandard

from hf_prune.checkpoint.packed.format import TABLE, Header, claim_fits, damaged

CHUNK = 1 << 16  # weights decoded at a time, so that positions stay in the cache
_AT_ONCE = 1 << 20  # bytes; larger sections are decompressed as a stream, since allocating their memory takes longer
_WINDOW = 1 << 23  # bytes of history for a stream, as RFC 8878 recommends; ours need half a megabyte


def rounded(values: np.ndarray, stored: torch.dtype, dtype: torch.dtype) -> np.ndarray:
    """Values, as integers of their bits, in another dtype."""
    if dtype == stored:
        return values
    as_floats = torch.from_numpy(values.view(np.uint8)).view(stored)
    return as_floats.to(dtype).view(torch.uint8).numpy().view(f"<u{dtype.itemsize}")


def has_operators() -> bool:
    """Whether hf_prune has loaded its operators, which do the same as the code here, several times as fast."""
    return hasattr(torch.ops.hf_prune, "place_bits")


def read_section(data: np.ndarray, header: Header, index: int) -> tuple[int, Callable[[int], np.ndarray]]:
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

    return claimed, _slices(read(claimed)) if claimed <= _AT_ONCE else read


def _slices(content: np.ndarray) -> Callable[[int], np.ndarray]:
    start = 0

    def read(count: int) -> np.ndarray:
        nonlocal start
        start += count
        return content[start - count : start]

    return read


def integers(header: Header) -> np.dtype[Any]:
    """The unsigned integers that hold the bits of a stored value."""
    return np.dtype(f"<u{header.dtype.itemsize}")


def _plane_reader(data: np.ndarray, header: Header, index: int) -> Callable[[int], np.ndarray]:
    """A function that reads one byte of each of the next values, from a plain plane or from pairs of numbers."""
    length, read = read_section(data, header, index)
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


def value_reader(data: np.ndarray, header: Header) -> Callable[[np.ndarray], np.ndarray]:
    """A function that reads the next stored values into an array, or returns them where they are stored unchanged."""
    kind = integers(header)
    if header.codec == "none":
        _, stored = read_section(data, header, 1)
        return lambda values: stored(values.nbytes).view(kind)
    planes = [_plane_reader(data, header, 1 + i) for i in range(kind.itemsize)]
    space = np.empty(min(CHUNK, header.kept), dtype=kind)

    def join_compiled(values: np.ndarray) -> np.ndarray:
        parts = [torch.from_numpy(plane(len(values))) for plane in planes]
        torch.ops.hf_prune.join_planes(parts, header.rotated, torch.from_numpy(values))
        return values

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

    return join_compiled if has_operators() else join


def int8_reader(data: np.ndarray, header: Header) -> Callable[[np.ndarray], np.ndarray]:
    """A function that reads the next stored values, given their positions: steps times the scale of the row."""
    length, read_scales = read_section(data, header, 1)
    _, read_steps = read_section(data, header, 2)
    count = length // 4
    scales, end = np.empty(0, dtype="<f4"), 0  # scales of some rows, and the first row after them

    def scales_of(rows: np.ndarray) -> np.ndarray:
        nonlocal scales, end
        result, start = np.empty(len(rows), dtype=np.float32), 0
        while start < len(rows):
            if rows[start] >= end:
                scales = read_scales(4 * min(CHUNK, count - end)).view("<f4")
                end += len(scales)
            stop = int(np.searchsorted(rows, end))
            result[start:stop] = scales[rows[start:stop] - (end - len(scales))]
            start = stop
        return result

    def read(positions: np.ndarray) -> np.ndarray:
        steps = read_steps(len(positions)).view(np.int8).astype(np.float32)
        values = torch.from_numpy(steps).mul_(torch.from_numpy(scales_of(positions // (header.numel // count))))
        return values.to(header.dtype).view(torch.uint8).numpy().view(integers(header))

    return read
