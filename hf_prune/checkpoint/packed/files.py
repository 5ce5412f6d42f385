"""Files of packed weights: written shard by shard, sealed with a checksum, and checked before they are used.

A weight ``X.weight`` becomes two tensors in the file: ``X.weight``, which is empty, and ``X.weight_packed``, its bytes.
A reader that does not know the format thus finds a weight of the wrong shape; a missing one might be initialized
randomly without an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from hf_prune.checkpoint.files import INDEX, SINGLE, read_index
from hf_prune.checkpoint.packed.format import (
    FILE_VERSION,
    FORMAT,
    HEADER_BYTES,
    KEY,
    SUFFIX,
    UNSEALED,
    Header,
    read_header,
)
from hf_prune.checkpoint.packed.seal import check_count, damaged_file, read_description, unseal
from hf_prune.checkpoint.packed.unpack import unpack_mask
from hf_prune.checkpoint.shards import Entry, Shards, header_bytes, read_tensor, write_all
from hf_prune.errors import CheckpointError


class Item(NamedTuple):
    """One tensor of a file: name, type as in safetensors, shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Any


def packed_item(name: str, dtype: str, data: np.ndarray) -> list[Item]:
    """The two tensors of a packed weight; transformers takes the dtype of a checkpoint from the empty one."""
    return [Item(name, dtype, (0,), b""), Item(name + SUFFIX, "U8", (len(data),), data.data)]


def plain_item(folder: Path, entry: Entry) -> Item:
    """Read a tensor from a safetensors file, to write it unchanged into another one."""
    data = bytearray(entry.size)
    with (folder / entry.shard).open("rb") as file:
        file.seek(entry.start)
        if file.readinto(data) != entry.size:
            raise CheckpointError(f"{entry.shard} ends within {entry.name}: it was changed; start again")
    return Item(entry.name, entry.dtype, entry.shape, data)


def write_shards(
    folder: Path, items: Iterable[Sequence[Item]], limit: int, header: Mapping[str, Any] | None = None
) -> None:
    """Write the weights of a checkpoint, with one file in memory at a time.

    Args:
        folder: A folder without weights.
        items: Groups of tensors; those of a group are put into the same file.
        limit: Largest size of a file in bytes, which a single larger group exceeds.
        header: The description of the checkpoint, sealed with a checksum in each file; None for plain files.
    """
    shards: list[tuple[Path, list[str]]] = []
    waiting: list[Item] = []
    total = size = 0

    def flush() -> None:
        path = folder / f"model-{len(shards)}.unnamed"
        _write(path, waiting, header)
        shards.append((path, [item.name for item in waiting]))
        waiting.clear()

    for group in items:
        length = sum(len(item.data) for item in group)
        if waiting and size + length > limit:
            flush()
            size = 0
        waiting.extend(group)
        size += length
        total += length
    if waiting or not shards:
        flush()
    if len(shards) == 1:
        shards[0][0].replace(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, start=1):
        path.replace(folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        weight_map |= dict.fromkeys(names, f"model-{number:05d}-of-{len(shards):05d}.safetensors")
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, items: Sequence[Item], header: Mapping[str, Any] | None) -> None:
    """Write one file: plain tensors before packed ones, large elements before small ones, so that all are aligned."""

    def order(item: Item) -> tuple[bool, int]:
        elements = int(np.prod(item.shape, dtype=object)) if item.shape else 1
        return item.name.endswith(SUFFIX), -(len(item.data) // elements if elements else 0)

    items = sorted(items, key=order)
    tensors = {item.name: (item.dtype, item.shape, len(item.data)) for item in items}
    metadata = {"format": "pt"}
    if header is not None:
        sealed = {"format": FORMAT, "version": FILE_VERSION, "checksum": UNSEALED, **header}
        metadata[KEY] = json.dumps(sealed, sort_keys=True)
    begin = header_bytes(tensors, metadata)
    if header is not None:
        digest = hashlib.sha256(begin)
        for item in items:
            digest.update(item.data)
        begin = begin.replace(UNSEALED.encode(), digest.hexdigest().encode(), 1)
    with path.open("wb", buffering=0) as file:
        for data in (begin, *(item.data for item in items)):
            write_all(file, data)


class PackedFiles:
    """The files of one packed checkpoint, with checksums, number of tensors and headers of packed weights checked.

    Args:
        paths: The files, in one folder.
        unsealed: Whether their checksums are compared elsewhere, as loading them does.

    Raises:
        CheckpointError: If a file is missing, damaged, or of another format or a newer version.
    """

    def __init__(self, paths: Sequence[str | Path], *, unsealed: bool = False) -> None:
        files = [Path(path) for path in paths]
        index = files[0].parent / INDEX if files[0].name != SINGLE else None
        if index is not None:
            named = sorted(set(read_index(index).values()))
            if named != sorted(path.name for path in files):
                raise CheckpointError(f"{index} names {named}, and the files are {sorted(p.name for p in files)}")
        self.header, *_ = [read_description(path)[0] if unsealed else unseal(path) for path in files]
        self.shards = Shards(files, index)
        if index is not None and (lost := set(self.shards.entries) - set(read_index(index))):
            raise damaged_file(index, f"it does not name {min(lost)}")
        dtypes = {name: entry.dtype for name, entry in self.shards.entries.items()}
        check_count(files[0], dtypes, self.header.get("tensors"))
        names = set(self.shards.entries)
        self.packed = sorted(name for name in names if name + SUFFIX in names)
        self.headers = {name: self._read_header(name) for name in self.packed}

    def _read_header(self, name: str) -> Header:
        entry = self.shards.entries[name + SUFFIX]
        if entry.dtype != "U8" or self.shards.entries[name].size:
            raise damaged_file(self.shards.folder / entry.shard, f"{name} is neither packed nor plain")
        with (self.shards.folder / entry.shard).open("rb") as file:
            file.seek(entry.start)
            start = file.read(min(entry.size, HEADER_BYTES))
        try:
            return read_header(start, entry.size)
        except CheckpointError as error:
            raise CheckpointError(f"{name} in {entry.shard}: {error}") from error

    def plain(self) -> list[Entry]:
        """The tensors that are stored unpacked."""
        hidden = {*self.packed, *(name + SUFFIX for name in self.packed)}
        return [entry for name, entry in self.shards.entries.items() if name not in hidden]

    def data(self, name: str) -> np.ndarray:
        """The bytes of a packed weight."""
        return read_tensor(self.shards.folder, self.shards.entries[name + SUFFIX]).numpy()

    def mask(self, name: str) -> Tensor:
        """The mask of a weight that was packed with one."""
        return unpack_mask(self.data(name), self.headers[name])

    def masks(self) -> dict[str, Tensor]:
        """The masks of all weights that were packed with one."""
        return {name: self.mask(name) for name, header in self.headers.items() if header.masked}
