"""The ``quantization_config`` that marks packed weights, and the sizes of shrunk modules, in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_prune.utils.quantization_method import METHOD

VERSION = 1
COMPRESSED = 1  # version of docs/format.md
MODELING = "modeling_hf_prune"  # the module in ``auto_map``, see remote_code.py


def structure_config(structure: Mapping[str, int]) -> dict[str, Any]:
    """The ``quantization_config`` of a shrunk checkpoint.

    Args:
        structure: Number of units of each group, see :func:`hf_prune.structured.shrink.structure_of`.
    """
    return {"quant_method": METHOD, "format_version": VERSION, "structure": dict(structure)}


def compressed_config(structure: Mapping[str, int]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint of packed weights.

    Args:
        structure: Number of units of each group, if the model is shrunk as well.
    """
    return {**structure_config(structure), "compressed": COMPRESSED}


def is_structure(structure: Any) -> bool:
    """Whether a value maps names of unit groups to numbers of units."""
    return isinstance(structure, dict) and all(
        isinstance(name, str) and isinstance(n, int) and not isinstance(n, bool) and n >= 0
        for name, n in structure.items()
    )


def is_ours(auto_map: Any) -> bool:
    """Whether a config's ``auto_map`` names our module, with or without a repository before it."""
    classes = auto_map.values() if isinstance(auto_map, dict) else ()
    return bool(classes) and all(str(name).rpartition("--")[2].startswith(f"{MODELING}.") for name in classes)
