"""The mask file: one bit per weight in safetensors, with the pruning settings in its header."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_prune.checkpoint.shards import Shards, read_tensor
from hf_prune.errors import CheckpointError
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.planning.config import PruningConfig
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.pruning.records import PolishRecord
from hf_prune.utils.files import atomic_path
from hf_prune.utils.wrapping import plain_name

MASK_FORMAT = "hf_prune.masks"
MASK_VERSION = 1
_HEADER = "hf_prune"


def save_masks(store: MaskStore, path: str | os.PathLike[str]) -> None:
    """Write masks as packed bits, atomically.

    Args:
        store: The masks and the settings that made them.
        path: The file.
    """
    masks = {plain_name(name): mask for name, mask in store.masks.packed.items()}  # the names in state dicts
    packed = {name: mask.bits.cpu() for name, mask in masks.items()}
    entries = {name: {"shape": list(mask.shape), "kept": mask.kept()} for name, mask in masks.items()}
    with atomic_path(path) as temporary:
        save_file(packed, temporary, mask_metadata(entries, store.config, store.polishes))


def pack_mask(mask: Tensor) -> np.ndarray:
    """A mask as bits, eight in a byte (uint8)."""
    return np.packbits(mask.cpu().numpy())


def mask_metadata(
    entries: Mapping[str, Mapping[str, Any]], config: PruningConfig | None, polishes: Iterable[PolishRecord] = ()
) -> dict[str, str]:
    """The metadata of a mask file.

    Args:
        entries: ``shape`` and ``kept``, the number of remaining weights, by parameter name.
        config: The settings that made the masks, if they are known.
        polishes: The records of trainings after a pruning.
    """
    header = {"format": MASK_FORMAT, "version": MASK_VERSION, "masks": entries, **describe_pruning(config, polishes)}
    # A single key, since safetensors writes several in no fixed order.
    return {_HEADER: json.dumps(header, sort_keys=True)}


def describe_pruning(config: PruningConfig | None, polishes: Iterable[PolishRecord]) -> dict[str, Any]:
    """How masks were made, as far as it is known: plain values for JSON."""
    described: dict[str, Any] = {} if config is None else {"config": config.to_dict()}
    if trained := [record.to_dict() for record in polishes]:
        described["polishes"] = trained
    return described


def read_pruning(
    described: Mapping[str, Any], path: str | os.PathLike[str]
) -> tuple[PruningConfig | None, tuple[PolishRecord, ...]]:
    """The inverse of :func:`describe_pruning`.

    Raises:
        CheckpointError: If the description is damaged.
    """
    try:
        config = PruningConfig.from_dict(described["config"]) if "config" in described else None
        return config, tuple(PolishRecord(**record) for record in described.get("polishes", ()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {error!r}; restore it, or delete it to load without masks")


def load_masks(path: str | os.PathLike[str]) -> MaskStore:
    """Read a file that :func:`save_masks` wrote.

    Raises:
        CheckpointError: If the file is damaged, of another kind, or of a newer version.
    """
    stored = StoredMasks(path)
    return MaskStore(PackedMasks(stored), config=stored.config, polishes=stored.polishes)


class StoredMasks(Mapping[str, Tensor]):
    """A mapping of the masks in a file, each read when it is used.

    Args:
        path: A file that :func:`save_masks` wrote.

    Raises:
        CheckpointError: If the file is damaged, of another kind, or of a newer version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            shards = Shards([self.path])  # reads the header once; safetensors would read it for each mask
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
        self._tensors = shards.entries
        names = set(self._tensors)
        try:
            header = json.loads(shards.shards[self.path.name].metadata.get(_HEADER, "{}"))
            kind = (header.get("format"), header.get("version"))
        except (AttributeError, RecursionError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: its header is not a JSON object: {error}") from error
        if kind != (MASK_FORMAT, MASK_VERSION):
            raise CheckpointError(
                f"{path} has format and version {kind}: expected {(MASK_FORMAT, MASK_VERSION)}; update hf_prune, or "
                f"delete the file to load the weights without masks"
            )
        self.config, self.polishes = read_pruning(header, path)
        try:
            self._entries = {name: dict(entry) for name, entry in header["masks"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from error
        if unknown := names - set(self._entries):
            raise CheckpointError(f"{path} is damaged: its header does not name {', '.join(sorted(unknown))}")
        if missing := sorted(set(self._entries) - names):
            raise _damaged(path, KeyError(missing[0]))

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        try:
            return _unpack(read_tensor(self.path.parent, self._tensors[name]).numpy(), **entry)
        except (AttributeError, OSError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise _damaged(self.path, error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _unpack(bits: np.ndarray, shape: list[int], kept: int) -> Tensor:
    size = math.prod(shape)
    if bits.dtype != np.uint8 or bits.shape != ((size + 7) // 8,):
        raise ValueError(f"{bits.dtype} bits of shape {bits.shape} for a mask of shape {shape}")
    mask = np.unpackbits(bits, count=size).astype(bool)
    if int(mask.sum()) != kept:
        raise ValueError(f"{int(mask.sum())} kept weights where the header says {kept}")
    return torch.from_numpy(mask).view(shape)
