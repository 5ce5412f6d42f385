"""Unpack weights, bit for bit, in small parts. Like ``format.py``, this code is also written into checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_prune.checkpoint.packed.format import ESCAPE, Header, damaged, pattern_table, read_header
from hf_prune.checkpoint.packed.values import (
    CHUNK,
    has_operators,
    int8_reader,
    integers,
    read_section,
    rounded,
    value_reader,
)


def unpack(data: np.ndarray, header: Header | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Unpack a weight that :func:`pack` packed. Besides the result, this takes the memory of small parts only.

    Args:
        data: The packed weight, one-dimensional uint8.
        header: Its header, if it was read before.
        dtype: Of the result, rounded as ``Tensor.to`` does; that of the packed weight by default.

    Returns:
        The weight, in its shape.

    Raises:
        CheckpointError: If it is damaged.
    """
    header = header or read_header(data)
    dtype = dtype or header.dtype
    if not data.flags.writeable:  # torch takes no others, although nothing is written
        data = data.copy()
    # Allocated by numpy, which uses large pages: getting small ones, as torch does, takes longer than filling them.
    by_operators = has_operators() and not header.lossy and not header.transposed
    fills = header.layout == "full" or (by_operators and header.layout == "bits")
    out = (np.empty if fills else np.zeros)(header.numel, dtype=f"<u{dtype.itemsize}")
    if header.layout == "full":
        read = value_reader(data, header)
        for start in range(0, header.numel, CHUNK):
            part = out[start : start + CHUNK]
            space = part if dtype == header.dtype else np.empty(len(part), dtype=integers(header))
            if (values := rounded(read(space), header.dtype, dtype)) is not part:
                part[:] = values
    elif header.lossy:
        read_at = int8_reader(data, header)
        for first, where in _chunks(data, header):
            _put(out, header, first, where, rounded(read_at(where + first), header.dtype, dtype))
    else:
        read = value_reader(data, header)
        space = np.empty(min(CHUNK, header.kept), dtype=integers(header))

        def next_values(count: int) -> np.ndarray:
            return rounded(read(space[:count]), header.dtype, dtype)

        if by_operators:
            _place_compiled(data, header, out, next_values)
        else:
            for first, where in _chunks(data, header):
                _put(out, header, first, where, next_values(len(where)))
    return torch.from_numpy(out.view(np.uint8)).view(dtype).view(header.shape)


def _place_compiled(
    data: np.ndarray, header: Header, out: np.ndarray, next_values: Callable[[int], np.ndarray]
) -> None:
    """What :func:`_chunks` and :func:`_put` do, by compiled operators."""
    operators, width, lookup = torch.ops.hf_prune, 0, np.empty((0, 0), dtype=np.uint8)
    if header.layout == "groups":
        width, lookup = _group_width(header), _group_positions(header).astype(np.uint8)
    first, remaining = 0, header.kept
    for part in _positions(data, header):
        bits, weights = torch.from_numpy(part), out[first:]
        if header.layout == "bits":
            weights = weights[: 8 * len(part)]
            count = operators.count_ones(bits)
        elif header.layout == "gaps":
            count = int(np.count_nonzero(part != ESCAPE))
        else:
            _check_numbers(part, len(lookup))
            count = min(remaining, len(part) * lookup.shape[1])
        remaining -= count
        if remaining < 0:
            break
        values, place = torch.from_numpy(next_values(count)), torch.from_numpy(weights)
        if header.layout == "bits":
            fits, step = operators.place_bits(bits, values, place) == count, 8 * len(part)
        elif header.layout == "gaps":
            step = operators.place_gaps(bits, values, place)
            fits = step >= 0
        else:
            fits = operators.place_groups(bits, torch.from_numpy(lookup), width, values, place)
            step = width * len(part)
        if not fits:
            break
        first += step
    else:
        if remaining == 0:
            return
    raise _wrong_positions(header)


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
    decode = {"bits": _bit_chunks, "gaps": _gap_chunks, "groups": _group_chunks}[header.layout]
    remaining = header.kept
    for first, where in decode(_positions(data, header), header):
        remaining -= len(where)
        if remaining < 0 or (len(where) and first + int(where[-1]) >= header.numel):
            break
        yield first, where
    else:
        if remaining == 0:
            return
    raise _wrong_positions(header)


def _positions(data: np.ndarray, header: Header) -> Iterator[np.ndarray]:
    """The section of positions, in parts that stand for at most ``CHUNK`` values."""
    length, read = read_section(data, header, 0)
    step = CHUNK // (_group_width(header) if header.layout == "groups" else {"bits": 8, "gaps": 1}[header.layout])
    for start in range(0, length, step):
        yield read(min(step, length - start))


def _wrong_positions(header: Header) -> Exception:
    return damaged(f"its positions are not those of {header.kept} values among {header.numel}")


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


def _group_positions(header: Header) -> np.ndarray:
    """The positions of kept weights for each byte of patterns: (bytes, groups in a byte * n)."""
    table = pattern_table(*header.group)
    groups, patterns, _ = table.shape
    numbers = np.arange(patterns**groups)
    return np.concatenate([table[i, numbers // patterns**i % patterns] for i in range(groups)], axis=1)


def _check_numbers(part: np.ndarray, known: int) -> None:
    if int(part.max()) >= known:
        raise damaged(f"a byte is {int(part.max())}, expected less than {known}")


def _group_chunks(parts: Iterable[np.ndarray], header: Header) -> Any:
    lookup, width = _group_positions(header), _group_width(header)
    starts = np.repeat(width * np.arange(CHUNK // width), lookup.shape[1])
    remaining = header.kept
    first = 0
    for part in parts:
        _check_numbers(part, len(lookup))
        # The indices are in range; mode "clip" only saves numpy a buffer.
        where = np.take(lookup, part, axis=0, mode="clip").reshape(-1)
        where += starts[: len(where)]
        where = where[:remaining]
        remaining -= len(where)
        yield first, where
        first += width * len(part)
