"""The names of a checkpoint's files, and where its weights are.

The weights are saved exactly as the dense model class saves them, so that plain transformers loads them. The masks are
in a file beside them, ``pruning_masks.safetensors``: one bit per weight, with the settings in its header.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_prune.errors import CheckpointError
from hf_prune.utils.folders import RUN_FILE
from hf_prune.utils.json_files import read_json_object
from hf_prune.utils.load_options import load_options

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTERS = "adapter_config.json"
MASK_FILE = "pruning_masks.safetensors"
SPARSITY_REPORT, TRAINING_REPORT = "sparsity_report.json", "training_report.json"
REPORTS = (SPARSITY_REPORT, TRAINING_REPORT)
CARD_DATA = "pruning_card.json"  # the facts of a card
# Names of weight files in transformers: single, sharded and of variants, such as model.fp16-00001-of-00002.safetensors.
WEIGHTS = re.compile(
    r"model(?:\.(?P<variant>[^/]+?))?(?:-\d{5}-of-\d{5})?\.safetensors|"
    r"model\.safetensors\.index(?:\.(?P<of>[^/]+))?\.json"
)
# Files that are only true of the weights beside them.
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
    RUN_FILE,
)


def is_weights(name: str, variant: str | None = None) -> bool:
    """Whether a file name is that of the weights of a variant, or of their index."""
    match = WEIGHTS.fullmatch(name)
    return match is not None and (match["variant"] or match["of"]) == variant


def has_weights(folder: Path, variant: str | None) -> bool:
    """Whether a folder has weights of a variant."""
    return any(is_weights(path.name, variant) for path in folder.iterdir())


def find_file(source: Any, filename: str, hub: Mapping[str, Any]) -> str | None:
    """The local path of a file of a checkpoint, downloaded if needed; None if the checkpoint has no such file."""
    from transformers.utils import cached_file

    options = {**load_options().hub(source), **hub}
    return cached_file(source, filename, _raise_exceptions_for_missing_entries=False, **options)


def size_of_weights(source: str | os.PathLike[str]) -> int | None:
    """The size of a checkpoint's weight and mask files in bytes; None if it has no safetensors files."""
    files = weight_files(source, {})
    masks = find_file(source, MASK_FILE, {})
    return sum(os.path.getsize(file) for file in [*files, *([masks] if masks else [])]) if files else None


def weight_files(source: Any, hub: Mapping[str, Any], variant: str | None = None) -> list[str]:
    """The safetensors files of a checkpoint, downloaded if needed; empty for other formats.

    Args:
        source: Folder or Hub id.
        hub: Options for downloads, such as ``revision`` and ``local_files_only``.
        variant: Variant of the weights, as in ``from_pretrained``.

    Raises:
        CheckpointError: If there are only pickles, the config names other files, or adapters lie beside the weights.
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
    for name in (of_variant(pickle, variant) for pickle in ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if find_file(source, name, hub) is not None:
            raise CheckpointError(
                f"{source} has its weights in {name}, a pickle, which can run code when it is opened: expected "
                f"{one}; if you trust it, convert it once with from_pretrained(...).save_pretrained(...) of "
                f"transformers"
            )
    return []


def file_paths(folder: str | Path) -> tuple[list[Path], Path | None]:
    """The safetensors files of a folder, and their index if there is one; :func:`weight_files` without the Hub.

    Raises:
        CheckpointError: If there are none, adapters lie beside them, or the index is damaged or names other folders.
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
    """The error for a model with an ``adapter_config.json`` beside it, which makes transformers load the adapters.

    Args:
        source: Folder or Hub id.
    """
    return CheckpointError(
        f"{source} holds a model and {ADAPTERS}, so transformers would load the adapters with the base model that it "
        f"names, and not this model: expected one of the two; move {ADAPTERS} and its weights to another folder, and "
        f"add them to the model with peft.PeftModel.from_pretrained(model, folder)"
    )


def refuse_weights_elsewhere(config: Path, name: str) -> None:
    """Make sure that transformers reads the same weight file.

    Args:
        config: The ``config.json`` of the checkpoint, which need not exist.
        name: The name of the weight file, or of the index of several.

    Raises:
        CheckpointError: If the config names another file.
    """
    try:
        named = read_json_object(config).get("transformers_weights")
    except CheckpointError:
        return  # other readers of the config report this
    if named not in (None, name):
        raise CheckpointError(
            f"{config} says that the weights are in {named!r} (transformers_weights), and not in {name}: expected "
            f"{SINGLE} or {INDEX}; rename the file and remove the key from the config"
        )


def read_index(path: Path) -> dict[str, str]:
    """Read the index of sharded weights: the file name of each tensor.

    Raises:
        CheckpointError: If it is missing or damaged, or names files in other folders.
    """
    try:
        index = read_json_object(path)
        weight_map = dict(index["weight_map"])
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
    if not isinstance(index.get("metadata"), dict):
        raise CheckpointError(
            f"{path} is damaged: its metadata is {index.get('metadata')!r:.100}, and transformers loads no index "
            f'without an object there; add "metadata": {{}} to it, or download or save the checkpoint again'
        )
    return weight_map


def of_variant(name: str, variant: str | None) -> str:
    """The name of a weight file or index for a variant."""
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
