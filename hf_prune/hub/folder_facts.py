"""What the files of a checkpoint say by themselves: sizes, checksums, settings, and how they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_prune.checkpoint.files import INDEX, MASK_FILE, REPORTS, SINGLE, file_paths
from hf_prune.checkpoint.mask_file import StoredMasks, read_pruning
from hf_prune.checkpoint.packed.quantization_config import is_ours
from hf_prune.checkpoint.packed.seal import is_packed, unseal
from hf_prune.checkpoint.sources import sentence_class
from hf_prune.errors import CheckpointError, DataError
from hf_prune.hub.checksums import checksums
from hf_prune.planning.config import PruningConfig
from hf_prune.structured.shrink_record import RECORD
from hf_prune.utils.json_files import read_config
from hf_prune.utils.quantization_method import METHOD

_MOST_LABELS = 8  # that a card names


def counted_facts(folder: Path) -> dict[str, Any]:
    """The fields of :class:`PruningCardData` that can be read from a checkpoint's files, without its reports.

    Raises:
        CheckpointError: If a file is damaged.
        DataError: If ``config.json`` is not valid JSON.
    """
    config = read_config(folder / "config.json", DataError)
    pruning, rounded = _pruning_settings(folder)
    settings = (config.get(RECORD) or {}).get("pruning_config")
    if pruning is None and settings is not None:
        pruning = PruningConfig.from_dict(settings)
    return {
        "config": pruning,
        "rounded": rounded,
        "needs_plugin": (config.get("quantization_config") or {}).get("quant_method") == METHOD,
        "remote_code": is_ours(config.get("auto_map")),
        "files": {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))},
        "checksums": checksums(folder),
        "labels": _labels(config),
        "tokens": any(name.endswith("ForCausalLM") for name in config.get("architectures") or []),
        "sentences": _class_for_sentences(folder),
    }


def _class_for_sentences(folder: Path) -> str:
    try:
        return sentence_class(folder)
    except CheckpointError:  # with what it cannot read, sentence-transformers loads it no more
        return ""


def _labels(config: Mapping[str, Any]) -> str:
    """The names of the classes in a config, in their order; empty if they have none of their own."""
    names = config.get("id2label")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        return ""
    kept = [name for number, name in names.items() if name != f"LABEL_{number}"]
    return ", ".join(kept[:_MOST_LABELS]) + (f" and {len(kept) - _MOST_LABELS} more" if kept[_MOST_LABELS:] else "")


def has_report(folder: Path) -> bool:
    """Whether a folder has a report that a card can be made from."""
    return any((folder / name).is_file() for name in REPORTS)


def is_rounded(folder: Path) -> bool:
    """Whether a checkpoint was written with ``values="int8"``.

    Raises:
        CheckpointError: If it is damaged.
    """
    first = _first_weight_file(folder)
    return first is not None and is_packed(first) and _has_rounded_values(unseal(first))


def _pruning_settings(folder: Path) -> tuple[PruningConfig | None, bool]:
    """The settings stored beside the masks, and whether values were rounded."""
    weights = _first_weight_file(folder)
    if weights is not None and is_packed(weights):
        header = unseal(weights)
        return read_pruning(header.get("pruning", {}), weights)[0], _has_rounded_values(header)
    masks = folder / MASK_FILE
    return StoredMasks(masks).config if masks.is_file() else None, False


def _first_weight_file(folder: Path) -> Path | None:
    """The weight file that is loaded, or the first of several; that of a variant if there is no other."""
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return file_paths(folder)[0][0]
    return next(iter(sorted(folder.glob("model*.safetensors"))), None)


def _has_rounded_values(header: Mapping[str, Any]) -> bool:
    return bool(header.get("values", "exact") != "exact")
