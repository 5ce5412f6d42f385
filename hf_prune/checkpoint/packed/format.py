"""The headers of packed weights, checked before anything is unpacked.

``docs/format.md`` is the specification. This module imports nothing else from hf_prune but its error and the method's
name, since its code is also written into checkpoints, see ``remote_code.py``.
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from hf_prune.errors import CheckpointError

CODECS = ("none", "zstd")
VALUES = ("exact", "int8")
LAYOUTS = ("full", "bits", "gaps", "groups")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPELLED = dict(zip(DTYPES, ("F32", "BF16", "F16", "F64"), strict=True))  # names in safetensors
MAGIC = b"hfp1"
HEAD = struct.Struct("<4s10BxxQ")
_MAX_DIMENSIONS = 8
HEADER_BYTES = HEAD.size + 8 * (_MAX_DIMENSIONS + 1 + 8)  # no header of a weight is longer
ALIGNMENT = 8
# The most bytes that one packed byte may expand to: writers pad up to it, and readers refuse more, so that a small file
# cannot claim a terabyte.
MAX_EXPANSION = 1024
# Unpacked sections (positions, scales, steps) may have 4 bytes for each byte of the weight plus _SPARE, for empty rows.
MOST_SECTIONS, _SPARE = 4, 1024
ESCAPE = 255  # in a gap: 255 zeros without a value after them
TABLE = 16  # a plane with at most 16 different bytes is stored as two 4-bit numbers in a byte
LEAST_PAIRED = 64  # values; with fewer, the length of a section would not show whether it is paired

FORMAT = "hf_prune.packed"
FILE_VERSION = 1
SUFFIX = "_packed"  # added to a weight's name for the tensor with its bytes
KEY = "hf_prune"  # of the header in a file's metadata
UNSEALED = "0" * 64  # in place of the checksum while it is computed


@dataclass(frozen=True)
class Header:
    """The header of a packed weight.

    Args:
        dtype: Dtype of the weight.
        shape: Shape of the weight.
        layout: How positions are stored: ``"full"``, ``"bits"``, ``"gaps"`` or ``"groups"``.
        kept: Number of stored values.
        masked: Whether the positions are a pruning mask, and not merely those of nonzero values.
        codec: ``"zstd"`` or ``"none"``.
        values: ``"exact"`` or ``"int8"``, which is lossy.
        rotated: Whether the sign was moved from the first bit of a value to the last.
        transposed: Whether the values are stored column by column.
        group: N and M of ``"groups"``, zeros otherwise.
        sections: Begin and end of each section in bytes: positions, scales of int8, values.
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
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def lossy(self) -> bool:
        """Whether values were rounded."""
        return self.values == "int8"


def read_header(data: Any, size: int | None = None) -> Header:
    """Read and check the header of a packed weight, without its sections.

    Args:
        data: The packed weight, or at least its first ``HEADER_BYTES`` bytes.
        size: Size of the packed weight in bytes; that of ``data`` by default.

    Raises:
        CheckpointError: If it is damaged, or claims a weight that is too large for its size.
    """
    size = len(data) if size is None else size
    try:
        magic, codec, dtype, layout, values, masked, rotated, transposed, n, m, ndim, kept = HEAD.unpack_from(data)
        if magic != MAGIC:
            raise damaged(f"it begins with {bytes(magic)!r}, expected {MAGIC!r}")
        if ndim > _MAX_DIMENSIONS:
            raise damaged(f"it has {ndim} dimensions, expected at most {_MAX_DIMENSIONS}")
        count = 1 + _value_sections(CODECS[codec], VALUES[values], DTYPES[dtype])
        numbers = struct.unpack_from(f"<{ndim + count}Q", data, HEAD.size)
        names = LAYOUTS[layout], CODECS[codec], VALUES[values]
    except (IndexError, struct.error) as error:
        raise damaged(f"its header is not valid: {error}") from error
    if max(masked, rotated, transposed) > 1:
        raise damaged("its header has flags other than 0 and 1")
    sections, start = [], _aligned(HEAD.size + 8 * len(numbers))
    for length in numbers[ndim:]:
        sections.append((start, start + length))
        start = _aligned(start + length)
    shape = numbers[:ndim]
    flags = bool(masked), bool(rotated), bool(transposed)
    header = Header(DTYPES[dtype], shape, names[0], kept, flags[0], *names[1:], *flags[1:], (n, m), tuple(sections))
    if start > size:
        raise damaged(f"its sections end at byte {start}, and it has {size}")
    dense = header.numel * header.dtype.itemsize
    # The product of sizes must fit 63 bits even if one of them is 0, since torch multiplies the others.
    if dense > size * MAX_EXPANSION or math.prod(max(length, 1) for length in shape) >= 1 << 63:
        raise damaged(f"{size} bytes claim to be a weight of shape {list(shape)}, {dense} bytes")
    _check_counts(header)
    if (unpacked := sum(_lengths(header, 0))) > MOST_SECTIONS * (dense + _SPARE):
        raise damaged(f"{size} bytes claim to be a weight of shape {list(shape)}, sections of {unpacked} bytes")
    return header


def damaged(what: str) -> CheckpointError:
    """The error for a damaged weight."""
    return CheckpointError(f"a packed weight is damaged: {what}; download or save the checkpoint again")


def _aligned(position: int) -> int:
    return position + -position % ALIGNMENT


def _value_sections(codec: str, values: str, dtype: torch.dtype) -> int:
    """The number of sections with values: scales and steps of int8; one for each byte of a value; or a single one."""
    return 2 if values == "int8" else dtype.itemsize if codec == "zstd" else 1


def _check_counts(header: Header) -> None:
    """Refuse a header whose numbers contradict each other or the lengths of its sections."""
    n, m = header.group
    kept, numel = header.kept, header.numel
    fits = {
        "full": kept == numel and header.values == "exact" and not header.transposed,
        "bits": kept <= numel,
        "gaps": kept <= numel,
        "groups": 0 < n < m <= 16 and numel % m == 0 and kept == numel // m * n and math.comb(m, n) <= 256,
    }[header.layout]
    if not fits or (header.layout != "groups" and (n or m)) or (header.lossy and not header.shape):
        raise damaged(f"{kept} values, layout {header.layout} of {n}:{m}, for a shape of {list(header.shape)}")
    if header.transposed and (header.layout != "groups" or len(header.shape) != 2):
        raise damaged(f"a shape of {list(header.shape)} cannot be transposed")
    if header.codec == "none":
        expected = [*_lengths(header, header.sections[0][1] - header.sections[0][0])]
        lengths = [end - start for start, end in header.sections]
        if lengths != expected:
            raise damaged(f"its sections have {lengths} bytes, expected {expected}")


def _lengths(header: Header, positions: int) -> list[int]:
    """The uncompressed size of each section in bytes; that of gaps is not known from the header, so it is passed."""
    if header.layout == "bits":
        positions = -(-header.numel // 8)
    elif header.layout == "full":
        positions = 0
    elif header.layout == "groups":
        per_byte = pattern_table(*header.group).shape[0]  # (groups in a byte, ...)
        positions = -(-(header.numel // header.group[1]) // per_byte)
    if header.lossy:
        return [positions, 4 * _rows(header), header.kept]
    if header.codec == "none":
        return [positions, header.kept * header.dtype.itemsize]
    return [positions, *[header.kept] * header.dtype.itemsize]


def _rows(header: Header) -> int:
    return header.shape[-1 if header.transposed else 0]


def claim_fits(header: Header, index: int, claimed: int) -> bool:
    """Whether an uncompressed section of ``claimed`` bytes fits the header."""
    if index == 0 and header.layout == "gaps":
        return header.kept <= claimed <= header.kept + header.numel // ESCAPE
    if index > 0 and not header.lossy and header.kept >= LEAST_PAIRED and claimed == TABLE + -(-header.kept // 2):
        return True
    return claimed == _lengths(header, 0)[index]


@cache
def pattern_table(n: int, m: int) -> np.ndarray:
    """Positions of the kept weights for each group in a byte and each pattern: (groups in a byte, patterns, n)."""
    patterns = np.array(list(itertools.combinations(range(m), n)), dtype=np.int64)
    groups = 1
    while len(patterns) ** (groups + 1) <= 256:
        groups += 1
    return patterns + m * np.arange(groups)[:, None, None]
