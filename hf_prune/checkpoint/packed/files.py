"""Files of packed weights: written shard by shard, sealed with a checksum, and checked before anybody uses them.

A weight ``X.weight`` is two tensors of the file: ``X.weight``, empty, and ``X.weight_packed``, its bytes. Whoever does
not know the format finds a weight of the wrong shape, and not none, in whose place random numbers would do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from hf_prune.checkpoint.packed.format import (
    FILE_VERSION,
    FORMAT,
    HEADER_BYTES,
    KEY,
    SUFFIX,
    UNSEALED,
    Header,
    check_count,
    damaged_file,
    read_header,
    unseal,
)
from hf_prune.checkpoint.packed.unpack import unpack_mask
from hf_prune.checkpoint.shards import Entry, Shards, header_bytes, read_tensor, write_all
from hf_prune.errors import CheckpointError
from hf_prune.utils.json_files import read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTERS = "adapter_config.json"


class Item(NamedTuple):
    """One tensor of a file: its type as safetensors spells it, and its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Any


def packed_item(name: str, dtype: str, data: np.ndarray) -> list[Item]:
    """The two tensors that stand for one packed weight; transformers takes a checkpoint's dtype from the first one."""
    return [Item(name, dtype, (0,), b""), Item(name + SUFFIX, "U8", (len(data),), data.data)]


def write_shards(
    folder: Path, items: Iterable[Sequence[Item]], limit: int, described: Mapping[str, Any] | None = None
) -> None:
    """Write the weights of a checkpoint, one file in memory at a time.

    Args:
        folder: Where there are no weights yet.
        items: Tensors; those that come together stay in one file.
        limit: Bytes of a file, which a single larger tensor exceeds.
        described: What the files say of the checkpoint, under a checksum; None for plain files without one.
    """
    shards: list[tuple[Path, list[str]]] = []
    waiting: list[Item] = []
    total = size = 0

    def flush() -> None:
        path = folder / f"model-{len(shards)}.unnamed"
        _write(path, waiting, described)
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


def _write(path: Path, items: Sequence[Item], described: Mapping[str, Any] | None) -> None:
    """What is not packed comes first, and large elements before small ones, so that all lie aligned."""

    def order(item: Item) -> tuple[bool, int]:
        elements = int(np.prod(item.shape, dtype=object)) if item.shape else 1
        return item.name.endswith(SUFFIX), -(len(item.data) // elements if elements else 0)

    items = sorted(items, key=order)
    tensors = {item.name: (item.dtype, item.shape, len(item.data)) for item in items}
    metadata = {"format": "pt"}
    if described is not None:
        header = {"format": FORMAT, "version": FILE_VERSION, "checksum": UNSEALED, **described}
        metadata[KEY] = json.dumps(header, sort_keys=True)
    begin = header_bytes(tensors, metadata)
    if described is not None:
        digest = hashlib.sha256(begin)
        for item in items:
            digest.update(item.data)
        begin = begin.replace(UNSEALED.encode(), digest.hexdigest().encode(), 1)
    with path.open("wb", buffering=0) as file:
        for data in (begin, *(item.data for item in items)):
            write_all(file, data)


def file_paths(folder: str | Path) -> tuple[list[Path], Path | None]:
    """The safetensors files of a folder, and their index if there is one.

    Raises:
        CheckpointError: If there are none, adapters lie beside them, or the index is damaged or leads elsewhere.
    """
    folder = Path(folder)
    if (folder / ADAPTERS).is_file():
        raise adapters_beside(folder)
    refuse_weights_elsewhere(folder / "config.json", SINGLE if (folder / SINGLE).is_file() else INDEX)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], None
    index = folder / INDEX
    if not index.is_file():
        raise CheckpointError(f"{folder} has no weights: expected {SINGLE} or {INDEX}")
    return [folder / name for name in sorted(set(read_index(index).values()))], index


def adapters_beside(source: object) -> CheckpointError:
    """The error for a model with an ``adapter_config.json`` beside it, which changes what transformers loads.

    Args:
        source: Folder or Hub id.
    """
    return CheckpointError(
        f"{source} holds a model and {ADAPTERS} beside it, by which transformers loads adapters, onto the weights that "
        f"it names, and not the model alone: expected one of them; move {ADAPTERS} and its weights to a folder of "
        f"their own, and lay them on the model with peft.PeftModel.from_pretrained(model, folder)"
    )


def refuse_weights_elsewhere(config: Path, found: str) -> None:
    """Make sure that transformers reads the file that is read here.

    Args:
        config: The ``config.json`` of the checkpoint, there or not.
        found: The name of the file, or of the index of several.

    Raises:
        CheckpointError: If the config names another one.
    """
    try:
        named = read_json_object(config).get("transformers_weights")
    except CheckpointError:
        return  # whoever reads it for what it says complains
    if named not in (None, found):
        raise CheckpointError(
            f"{config} says that the weights are in {named!r} (transformers_weights), and not in {found}: expected "
            f"{SINGLE} or {INDEX}; give the file that name and take the key out of the config"
        )


def read_index(path: Path) -> dict[str, str]:
    """Which tensor is in which file.

    Raises:
        CheckpointError: If it is missing, damaged or leads out of its folder.
    """
    try:
        found = read_json_object(path)
        weight_map = dict(found["weight_map"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}; download or save the checkpoint again") from error
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not set(shard) & set("/\\:\0")
        if not plain:
            raise CheckpointError(
                f"{path} says that {name} is in {shard!r}: expected a .safetensors file in the same folder; do not "
                f"use this checkpoint"
            )
    if not weight_map:
        raise CheckpointError(f"{path} is damaged: it names no tensor; download or save the checkpoint again")
    if not isinstance(found.get("metadata"), dict):
        raise CheckpointError(
            f"{path} is damaged: its metadata is {found.get('metadata')!r:.100}, and transformers loads no index "
            f'without an object there; add "metadata": {{}} to it, or download or save the checkpoint again'
        )
    return weight_map


class PackedFiles:
    """The files of one packed checkpoint, checked: checksums, counts, and what every packed weight claims.

    Args:
        paths: The files, in one folder.

    Raises:
        CheckpointError: If one is missing, damaged, of another kind or a newer version, or not all are there.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        files = [Path(path) for path in paths]
        index = files[0].parent / INDEX if files[0].name != SINGLE else None
        if index is not None:
            named = sorted(set(read_index(index).values()))
            if named != sorted(path.name for path in files):
                raise CheckpointError(f"{index} names {named}, and the files are {sorted(p.name for p in files)}")
        self.described, *_ = [unseal(path) for path in files]
        self.shards = Shards(files, index)
        if index is not None and (lost := set(self.shards.entries) - set(read_index(index))):
            raise damaged_file(index, f"it does not name {min(lost)}")
        dtypes = {name: entry.dtype for name, entry in self.shards.entries.items()}
        check_count(files[0], dtypes, self.described.get("tensors"))
        names = set(self.shards.entries)
        self.packed = sorted(name for name in names if name + SUFFIX in names)
        self.headers = {name: self._header(name) for name in self.packed}

    def _header(self, name: str) -> Header:
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
        """Tensors that are stored as they are."""
        hidden = {*self.packed, *(name + SUFFIX for name in self.packed)}
        return [entry for name, entry in self.shards.entries.items() if name not in hidden]

    def data(self, name: str) -> np.ndarray:
        """The bytes of a packed weight."""
        return read_tensor(self.shards.folder, self.shards.entries[name + SUFFIX]).numpy()

    def mask(self, name: str) -> Tensor:
        """The mask of a weight that was packed with one."""
        return unpack_mask(self.data(name), self.headers[name])

    def masks(self) -> dict[str, Tensor]:
        """All of them."""
        return {name: self.mask(name) for name, header in self.headers.items() if header.masked}
