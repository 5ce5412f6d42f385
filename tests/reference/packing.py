"""A packed weight read value by value, as docs/format.md says, with nothing of hf_prune."""

from __future__ import annotations

import struct
from itertools import combinations
from math import comb, prod

import torch
import zstandard
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FULL, BITS, GAPS, GROUPS = range(4)


def read(data: bytes) -> tuple[Tensor, list[bool], bool]:
    """The weight, which of its values are stored, in its own order, and whether these are a mask."""
    magic, codec, dtype, layout, int8, masked, rotated, transposed, n, m, ndim, kept = struct.unpack_from(
        "<4s10BxxQ", data
    )
    assert magic == b"hfp1"
    size = DTYPES[dtype].itemsize
    count = 1 + (2 if int8 else size if codec else 1)
    numbers = struct.unpack_from(f"<{ndim + count}Q", data, 24)
    shape, lengths = numbers[:ndim], numbers[ndim:]
    start, sections = 24 + 8 * len(numbers), []
    for length in lengths:
        start += -start % 8
        section = data[start : start + length]
        sections.append(zstandard.ZstdDecompressor().decompress(section) if codec and section else section)
        start += length
    numel = prod(shape)
    where = positions(sections[0], layout, numel, kept, n, m)
    assert len(where) == kept
    order = shape[::-1] if transposed else shape  # in which the values follow each other
    stored = values(sections[1:], kept, size, codec, rotated, int8, where, numel, order)
    flat = torch.zeros(numel, dtype=DTYPES[dtype])
    keep = [False] * numel
    for position, value in zip(where, stored, strict=True):
        if int8:
            flat[position] = torch.tensor(value).to(flat.dtype)
        else:
            flat[position] = torch.frombuffer(bytearray(value), dtype=flat.dtype)[0]
        keep[position] = True
    if transposed:
        rows, columns = shape
        keep = [keep[column * rows + row] for row in range(rows) for column in range(columns)]
        return flat.view(order).t(), keep, bool(masked)
    return flat.view(shape), keep, bool(masked)


def positions(section: bytes, layout: int, numel: int, kept: int, n: int, m: int) -> list[int]:
    """Where values are stored."""
    if layout == FULL:
        return list(range(numel))
    if layout == BITS:
        return [i for i in range(numel) if section[i // 8] >> (7 - i % 8) & 1]
    found, position = [], -1
    if layout == GAPS:
        for gap in section:
            position += gap
            if gap != 255:
                position += 1
                found.append(position)
        return found
    patterns = list(combinations(range(m), n))
    per_byte = 1
    while comb(m, n) ** (per_byte + 1) <= 256:
        per_byte += 1
    for group in range(numel // m):
        number = section[group // per_byte] // len(patterns) ** (group % per_byte) % len(patterns)
        found += [group * m + i for i in patterns[number]]
    return found


def plane(section: bytes, kept: int) -> bytes:
    """One byte of each value."""
    if kept < 64 or len(section) != 16 + (kept + 1) // 2:
        return section
    return bytes(section[section[16 + i // 2] >> 4 * (i % 2) & 15] for i in range(kept))


def values(
    sections: list[bytes],
    kept: int,
    size: int,
    codec: int,
    rotated: int,
    int8: int,
    where: list[int],
    numel: int,
    shape: tuple[int, ...],
) -> list:
    """The stored values: bytes, or floats of int8."""
    if int8:
        scales = struct.unpack(f"<{shape[0]}f", sections[0])
        steps = struct.unpack(f"{kept}b", sections[1])
        row = numel // shape[0]
        return [(torch.tensor(scales[p // row]) * step).item() for p, step in zip(where, steps, strict=True)]
    if codec:
        sections = [plane(section, kept) for section in sections]
    if not codec:
        return [sections[0][i * size : (i + 1) * size] for i in range(kept)]
    stored = []
    for i in range(kept):
        number = int.from_bytes(bytes(plane[i] for plane in sections), "little")
        if rotated:
            number = number >> 1 | (number & 1) << (8 * size - 1)
        stored.append(number.to_bytes(size, "little"))
    return stored
