"""Read safetensors files tensor by tensor, and write tensors to the same places in a copy.

The format is an 8-byte little-endian length, a JSON header of that length, and the bytes of the tensors one after the
other. Pruning changes no shape and no dtype, so a pruned file has the same header as the dense one, byte for byte, and
every tensor stays in its place. Files are read and not mapped, so a process holds only the memory that it asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_prune.errors import CheckpointError
from hf_prune.utils.json_files import read_json_object
from hf_prune.utils.offload_cache import raw_bytes

CHUNK_BYTES = 1 << 20  # copied at a time; a multiple of every element's size
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """The place of a tensor in a file.

    Args:
        name: Name of the tensor.
        shard: Name of the file.
        dtype: As in the header, such as ``"BF16"``.
        shape: Shape of the tensor.
        start: Offset of its first byte in the file.
        size: Number of bytes.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in PyTorch.

        Raises:
            CheckpointError: If it is a packed or 8-bit type of quantized checkpoints.
        """
        if self.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.name} in {self.shard} has type {self.dtype}: expected one of {', '.join(_DTYPES)}; "
                f"prune before quantizing"
            )
        return _DTYPES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """One file: its name, size, header bytes, tensors in the order of their places, and metadata."""

    name: str
    size: int
    header: bytes
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]


class Shards:
    """The safetensors files of one checkpoint.

    Args:
        paths: The files, in one folder.
        index: The index file, if there are several.

    Raises:
        CheckpointError: If a file is missing or damaged, or contradicts the index.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], index: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(paths[0]).parent
        self.shards = {shard.name: shard for shard in map(_read_shard, map(Path, paths))}
        self.entries: dict[str, Entry] = {}
        for shard in self.shards.values():
            for entry in shard.entries:
                if entry.name in self.entries:
                    raise CheckpointError(
                        f"{entry.name} is in {self.entries[entry.name].shard} and in {shard.name}: expected it once; "
                        f"download or save the checkpoint again"
                    )
                self.entries[entry.name] = entry
        if index is not None:
            self._check_index(read_json_object(index)["weight_map"])

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        for name, shard in weight_map.items():
            if shard not in self.shards:
                raise CheckpointError(
                    f"{shard} is missing from {self.folder}, and the index says that {name} is in it: download or "
                    f"save the checkpoint again"
                )
            if name not in self.entries or self.entries[name].shard != shard:
                actual = self.entries[name].shard if name in self.entries else "no file"
                raise CheckpointError(
                    f"the index says that {name} is in {shard}, and it is in {actual}: download or save the checkpoint "
                    f"again"
                )

    def fingerprint(self) -> str:
        """A hash of the names, sizes, headers and times of the files, which differs after any change of them."""
        digest = hashlib.sha256()
        for name, shard in sorted(self.shards.items()):
            digest.update(f"{name} {shard.size} {(self.folder / name).stat().st_mtime_ns}\n".encode())
            digest.update(hashlib.sha256(shard.header).digest())
        return digest.hexdigest()


def read_tensor(folder: Path, entry: Entry) -> Tensor:
    """Read one tensor, on the CPU.

    Raises:
        CheckpointError: If the file was cut off since its header was read.
    """
    tensor = torch.empty(entry.shape, dtype=entry.torch_dtype)
    with open(folder / entry.shard, "rb", buffering=0) as file:
        _read_into(file, entry, entry.start, tensor)
    return tensor


def read_rows(folder: Path, entry: Entry, rows: Sequence[int]) -> Tensor:
    """Read some rows of a matrix, without reading the others.

    Args:
        folder: Folder of the file.
        entry: A tensor with two or more dimensions.
        rows: Indices of the rows.

    Returns:
        The rows (len(rows), ...), in the given order.
    """
    tensor = torch.empty((len(rows), *entry.shape[1:]), dtype=entry.torch_dtype)
    length = entry.size // entry.shape[0]
    with open(folder / entry.shard, "rb", buffering=0) as file:
        for row, number in zip(tensor, rows, strict=True):
            _read_into(file, entry, entry.start + number * length, row)
    return tensor


def read_parts(folder: Path, entry: Entry) -> Iterator[bytearray]:
    """Read the bytes of one tensor in parts, which all use the same memory."""
    buffer = bytearray(min(CHUNK_BYTES, entry.size))
    view = memoryview(buffer)
    with open(folder / entry.shard, "rb", buffering=0) as file:
        file.seek(entry.start)
        remaining = entry.size
        while remaining:
            part = buffer if remaining >= len(buffer) else bytearray(remaining)
            _fill(file, view if part is buffer else memoryview(part), entry)
            yield part
            remaining -= len(part)


def write_tensor(folder: Path, entry: Entry, tensor: Tensor) -> None:
    """Write a tensor to its place in an existing file."""
    assert tensor.dtype == entry.torch_dtype
    assert tuple(tensor.shape) == entry.shape
    with open(folder / entry.shard, "r+b", buffering=0) as file:
        file.seek(entry.start)
        write_all(file, raw_bytes(tensor.contiguous()))


def write_all(file: Any, data: Any) -> None:
    """Write every byte to an unbuffered file, or raise an OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def header_bytes(tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """The length and header at the beginning of a safetensors file.

    Args:
        tensors: Type, shape and number of bytes of each tensor by name, in the order of their places.
        metadata: The metadata of the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return _LENGTH.pack(len(text)) + text


def _read_shard(path: Path) -> Shard:
    try:
        with safe_open(path, "np"):  # checks the whole header against the size of the file
            pass
        with path.open("rb") as file:
            length = file.read(_LENGTH.size)
            header = length + file.read(*_LENGTH.unpack(length))
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: download or save the checkpoint again") from error
    except (SafetensorError, struct.error) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {error}; download or save the checkpoint again"
        ) from error
    entries = []
    tensors = json.loads(header[_LENGTH.size :])
    metadata = tensors.pop("__metadata__", None) or {}
    for name, value in tensors.items():
        start, end = value["data_offsets"]
        shape = tuple(value["shape"])
        if max(shape, default=0) >= 1 << 63:  # passes the check above if another size is 0
            raise CheckpointError(
                f"{path} says that {name} has the shape {list(shape)}: expected sizes below 2^63; download or save the "
                f"checkpoint again"
            )
        entries.append(Entry(name, path.name, value["dtype"], shape, len(header) + start, end - start))
    return Shard(path.name, size, header, tuple(sorted(entries, key=lambda entry: (entry.start, entry.size))), metadata)


def _read_into(file: Any, entry: Entry, start: int, tensor: Tensor) -> None:
    file.seek(start)
    _fill(file, memoryview(raw_bytes(tensor)), entry)


def _fill(file: BinaryIO, view: memoryview, entry: Entry) -> None:
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{entry.shard} ends within {entry.name}: it was changed; start again")
        view = view[count:]
