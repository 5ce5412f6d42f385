"""Checkpoints: native dense files that any transformers loads, and the masks in a side file.

The weights are saved exactly as the dense model class would save them. Beside them lies
``pruning_masks.safetensors``: one bit per target weight, and the settings in its header.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_prune.checkpoint.packed.files import (
    ADAPTERS,
    INDEX,
    SINGLE,
    adapters_beside,
    read_index,
    refuse_weights_elsewhere,
)
from hf_prune.errors import CheckpointError

MASK_FILE = "pruning_masks.safetensors"
REPORTS = ("sparsity_report.json", "training_report.json")
CARD_DATA = "pruning_card.json"  # what a card was rendered from
# As transformers names weights, whole, in parts, and in variants: model.fp16-00001-of-00002.safetensors.
WEIGHTS = re.compile(
    r"model(?:\.(?P<variant>[^/]+?))?(?:-\d{5}-of-\d{5})?\.safetensors|"
    r"model\.safetensors\.index(?:\.(?P<of>[^/]+))?\.json"
)
# What describes the weights it lies beside, and no others.
OF_WEIGHTS = (
    *REPORTS,
    CARD_DATA,
    "layers.png",
    "weights.png",
    "sparsity_search.json",
    "vocabulary_report.json",
    "lottery.json",
    "ticket.safetensors",
    "modeling_hf_prune.py",
)


def is_weights(name: str, variant: str | None = None) -> bool:
    """Whether a file in a checkpoint's folder has weights of a variant, or is the index of its parts."""
    match = WEIGHTS.fullmatch(name)
    return match is not None and (match["variant"] or match["of"]) == variant


def has_weights(folder: Path, variant: str | None) -> bool:
    """Whether a folder holds weights of a variant."""
    return any(is_weights(path.name, variant) for path in folder.iterdir())


def find_file(source: Any, filename: str, hub: Mapping[str, Any]) -> str | None:
    """The local path of a checkpoint's file, downloaded if need be; None if the checkpoint has none."""
    from transformers.utils import cached_file

    return cached_file(source, filename, _raise_exceptions_for_missing_entries=False, **hub)


def size_of_weights(source: str | os.PathLike[str]) -> int | None:
    """How many bytes the files of weights and masks of a checkpoint have; None where it has no safetensors files."""
    files = weight_files(source, {})
    masks = find_file(source, MASK_FILE, {})
    return sum(os.path.getsize(file) for file in [*files, *([masks] if masks else [])]) if files else None


def weight_files(source: Any, hub: Mapping[str, Any], variant: str | None = None) -> list[str]:
    """The safetensors files of a checkpoint; none for formats of other kinds.

    Args:
        source: Folder or Hub id.
        hub: How the Hub is asked.
        variant: Of the weights, as of ``from_pretrained``.

    Raises:
        CheckpointError: If all it has is a pickle, its config names other files, or adapters lie beside them.
    """
    one, several = of_variant(SINGLE, variant), of_variant(INDEX, variant)
    single = find_file(source, one, hub)
    if find_file(source, ADAPTERS, hub) is not None and (single or find_file(source, several, hub)) is not None:
        raise adapters_beside(source)
    if (config := find_file(source, "config.json", hub)) is not None:
        refuse_weights_elsewhere(Path(config), several if single is None else one)
    if single is not None:
        return [single]
    if (index := find_file(source, several, hub)) is not None:
        weight_map = read_index(Path(index))
        shards = sorted(set(weight_map.values()))
        paths = {shard: find_file(source, shard, hub) for shard in shards}
        if missing := [shard for shard, path in paths.items() if path is None]:
            name = next(name for name, shard in weight_map.items() if shard == missing[0])
            raise CheckpointError(
                f"{missing[0]} is missing from {source}, and the index says that weights are in it: it names {name}, "
                f"and no file has it: download or save the checkpoint again"
            )
        return [path for path in paths.values() if path is not None]
    for name in (of_variant(each, variant) for each in ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if find_file(source, name, hub) is not None:
            raise CheckpointError(
                f"{source} has its weights in {name}, a pickle, which can run code when it is opened: expected "
                f"{one}; if you trust it, convert it once with transformers' "
                f"from_pretrained(...).save_pretrained(...)"
            )
    return []


def of_variant(name: str, variant: str | None) -> str:
    """What transformers calls a file of weights, or their index, in a variant."""
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def tensor_names(file: str) -> list[str]:
    """The names of the tensors in a safetensors file.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}; download or save it again") from error
