"""Reads packed weights: what a file and each weight in it say of themselves, checked, and the values, bit for bit.

``docs/format.md`` is the specification. Nothing here needs the rest of the package, since this file travels with
checkpoints that load without it, see ``remote_code.py``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from hf_prune.errors import CheckpointError

CODECS = ("none", "zstd")
VALUES = ("exact", "int8")
LAYOUTS = ("full", "bits", "gaps", "groups")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAGIC = b"hfp1"
HEAD = struct.Struct("<4s10BxxQ")
_MAX_DIMENSIONS = 8
HEADER_BYTES = HEAD.size + 8 * (_MAX_DIMENSIONS + 1 + 8)  # no header of a weight is longer
ALIGNMENT = 8
# Nobody has to believe that a few bytes stand for a terabyte: writers pad to this, readers refuse what is beyond it.
MAX_EXPANSION = 1024
ESCAPE = 255  # of a gap: that many zeros, and no value after them
_CHUNK = 1 << 16  # decoded at a time, so that positions stay in the cache
_AT_ONCE = 1 << 20  # bytes of a section that are decompressed in one piece: new memory for more takes longer to get
TABLE = 16  # a plane of at most so many different bytes is written two to a byte: Huffman codes have no half bits
LEAST_PAIRED = 64  # values; with fewer, the length of a section would not tell how it is written

FORMAT = "hf_prune.packed"
FILE_VERSION = 1
SUFFIX = "_packed"  # of the tensor that has the bytes of a weight
KEY = "hf_prune"  # of a file's metadata
UNSEALED = "0" * 64  # in the place of the checksum while that is computed
_READ_BYTES = 1 << 18  # hashed at a time


# --- files -----------------------------------------------------------------------------------------


def is_packed(path: str | Path) -> bool:
    """Whether a safetensors file says that it is one of packed weights; False for a damaged one."""
    return f'\\"{FORMAT}\\"'.encode() in _first_bytes(Path(path))


def check_files(paths: Sequence[str | Path]) -> None:
    """Make sure that files of packed weights are as they were written, and all there.

    Raises:
        CheckpointError: If one is missing, damaged, of another kind or a newer version, or not all are there.
    """
    names: set[str] = set()
    for path in map(Path, paths):
        expected = unseal(path).get("tensors")
        names |= set(json.loads(_first_bytes(path))) - {"__metadata__"}
    packed = sum(name + SUFFIX in names for name in names)
    if len(names) - packed != expected:
        raise damaged_file(Path(paths[0]), f"the files have {len(names) - packed} tensors, expected {expected}")


def unseal(path: Path) -> dict[str, Any]:
    """What a file says of its checkpoint, if it has not changed since it was written.

    Raises:
        CheckpointError: If it has, or is of another kind, or of a newer version.
    """
    try:
        text = _first_bytes(path)
        described = json.loads(json.loads(text)["__metadata__"][KEY])
        found = described["format"], described["version"]
        checksum = str(described["checksum"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: download or save the checkpoint again") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise damaged_file(path, f"its header does not describe packed weights: {error!r}") from error
    if found != (FORMAT, FILE_VERSION):
        raise CheckpointError(
            f"{path} has format and version {found}: expected {(FORMAT, FILE_VERSION)}; update hf_prune, or save "
            f"it again"
        )
    where = text.find(checksum.encode()) if len(checksum) == len(UNSEALED) else -1
    if where < 0 or _digest(path, 8 + where) != checksum:
        raise damaged_file(path, "its bytes do not give its checksum")
    return described


def _digest(path: Path, hole: int) -> str:
    """SHA-256 of a file in which the checksum's own digits are zeros."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(hole))
        file.seek(len(UNSEALED), 1)
        digest.update(UNSEALED.encode())
        part = memoryview(bytearray(_READ_BYTES))  # of its own each time would be new memory, which is slow
        while length := file.readinto(part):
            digest.update(part[:length])
    return digest.hexdigest()


def damaged_file(path: Path, what: str) -> CheckpointError:
    """What to raise about a file."""
    return CheckpointError(f"{path} is damaged: {what}; download or save the checkpoint again")


def _first_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, size))


# --- weights ---------------------------------------------------------------------------------------


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
        magic, codec, dtype, layout, values, masked, rotated, transposed, n, m, ndim, kept = HEAD.unpack_from(data)
        if magic != MAGIC:
            raise _damaged(f"it begins with {bytes(magic)!r}, expected {MAGIC!r}")
        if ndim > _MAX_DIMENSIONS:
            raise _damaged(f"it has {ndim} dimensions, expected at most {_MAX_DIMENSIONS}")
        count = 1 + _value_sections(CODECS[codec], VALUES[values], DTYPES[dtype])
        numbers = struct.unpack_from(f"<{ndim + count}Q", data, HEAD.size)
        names = LAYOUTS[layout], CODECS[codec], VALUES[values]
    except (IndexError, struct.error) as error:
        raise _damaged(f"its header makes no sense: {error}") from error
    if max(masked, rotated, transposed) > 1:
        raise _damaged("its header has flags other than 0 and 1")
    sections, start = [], _aligned(HEAD.size + 8 * len(numbers))
    for length in numbers[ndim:]:
        sections.append((start, start + length))
        start = _aligned(start + length)
    shape = numbers[:ndim]
    header = Header(
        DTYPES[dtype],
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


def unpack(data: np.ndarray, header: Header | None = None) -> Tensor:
    """The weight that :func:`pack` packed.

    Args:
        data: uint8, one-dimensional.
        header: What :func:`read_header` says of it, if it was called.

    Raises:
        CheckpointError: If it is damaged.
    """
    header = header or read_header(data)
    if header.lossy:
        return _shaped(_from_int8(data, header), header)
    read = _value_reader(data, header)
    # numpy asks for large pages where torch does not, and to get small ones takes longer than to fill them
    make = np.empty if header.layout == "full" else np.zeros
    out = make(header.numel, dtype=_integers(header))
    if header.layout == "full":
        for start in range(0, header.numel, _CHUNK):
            part = out[start : start + _CHUNK]
            if (values := read(part)) is not part:
                part[:] = values
    else:
        space = np.empty(min(_CHUNK, header.kept), dtype=out.dtype)
        for first, where in _chunks(data, header):
            out[first:][where] = read(space[: len(where)])
    return _shaped(torch.from_numpy(out.view(np.uint8)).view(header.dtype), header)


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


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(f"a packed weight is damaged: {what}; download or save the checkpoint again")


def _aligned(position: int) -> int:
    return position + -position % ALIGNMENT


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
        per_byte = pattern_table(*header.group).shape[0]  # (groups in a byte, ...)
        positions = -(-(header.numel // header.group[1]) // per_byte)
    if header.lossy:
        return [positions, 4 * _rows(header), header.kept]
    if header.codec == "none":
        return [positions, header.kept * header.dtype.itemsize]
    return [positions, *[header.kept] * header.dtype.itemsize]


def _rows(header: Header) -> int:
    return header.shape[-1 if header.transposed else 0]


def _section(data: np.ndarray, header: Header, index: int) -> tuple[int, Callable[[int], np.ndarray]]:
    """How many bytes a section holds, and what reads so many of them on from where it stopped."""
    start, end = header.sections[index]
    part = data[start:end]
    if header.codec == "none" or (index == 0 and header.layout == "full"):
        return len(part), _slices(part)
    try:
        # what the frame says it will become decides whether it is unpacked at all
        claimed = zstandard.frame_content_size(part.data) if len(part) else -1
        if not _claim_fits(header, index, claimed):
            raise _damaged(f"section {index} claims to hold {claimed} bytes")
        if claimed <= _AT_ONCE:
            return claimed, _slices(np.frombuffer(zstandard.ZstdDecompressor().decompress(part.data), dtype=np.uint8))
    except zstandard.ZstdError as error:
        raise _damaged(str(error)) from error
    frame = zstandard.ZstdDecompressor().stream_reader(part.data)

    def read(count: int) -> np.ndarray:
        found = np.empty(count, dtype=np.uint8)
        try:
            if frame.readinto(found.data) == count:
                return found
        except zstandard.ZstdError as error:
            raise _damaged(str(error)) from error
        raise _damaged(f"section {index} ends early")

    return claimed, read


def _slices(content: np.ndarray) -> Callable[[int], np.ndarray]:
    start = 0

    def read(count: int) -> np.ndarray:
        nonlocal start
        start += count
        return content[start - count : start]

    return read


def _claim_fits(header: Header, index: int, claimed: int) -> bool:
    """Whether a section of so many bytes is what the header calls for."""
    if index == 0 and header.layout == "gaps":
        return header.kept <= claimed <= header.kept + header.numel // ESCAPE
    if index > 0 and not header.lossy and header.kept >= LEAST_PAIRED and claimed == TABLE + -(-header.kept // 2):
        return True
    return claimed == _lengths(header, 0)[index]


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


def _from_int8(data: np.ndarray, header: Header) -> Tensor:
    length, read = _section(data, header, 1)
    scales = torch.from_numpy(read(length).view("<f4").astype(np.float32))
    _, read = _section(data, header, 2)
    steps = np.zeros(header.numel, dtype=np.int8)
    for first, where in _chunks(data, header):
        steps[first:][where] = read(len(where)).view(np.int8)
    rows = torch.from_numpy(steps).view(len(scales), -1) if len(scales) else torch.from_numpy(steps)
    return (rows * scales.unsqueeze(1)).to(header.dtype).view(-1)


@cache
def pattern_table(n: int, m: int) -> np.ndarray:
    """Positions within a group by number of the pattern: (groups in a byte, patterns, n)."""
    patterns = np.array(list(itertools.combinations(range(m), n)), dtype=np.int64)
    groups = 1
    while len(patterns) ** (groups + 1) <= 256:
        groups += 1
    return patterns + m * np.arange(groups)[:, None, None]


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
    raise _damaged(f"its positions are not those of {header.kept} values among {header.numel}")


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
            raise _damaged(f"a byte is {int(part.max())}, expected less than {len(lookup)}")
        # indices are in range, and "clip" spares a buffer
        where = np.take(lookup, part, axis=0, mode="clip").reshape(-1)
        where += starts[: len(where)]
        where = where[:left]
        left -= len(where)
        yield first, where
        first += width * len(part)
