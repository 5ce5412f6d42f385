"""How ``config.json`` says that weights are packed, or modules have other sizes than it alone makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_prune.utils.quantization_method import METHOD

VERSION = 1
COMPRESSED = 1  # the version of docs/format.md
MODELING = "modeling_hf_prune"  # the module that ``auto_map`` names, see remote_code.py


def structure_config(structure: Mapping[str, int]) -> dict[str, Any]:
    """The ``quantization_config`` of a shrunk checkpoint.

    Args:
        structure: Numbers of units by site, see :func:`hf_prune.structured.shrink.structure_of`.
    """
    return {"quant_method": METHOD, "format_version": VERSION, "structure": dict(structure)}


def compressed_config(structure: Mapping[str, int]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint of packed weights.

    Args:
        structure: Numbers of units by site, of a model that is shrunk as well.
    """
    return {**structure_config(structure), "compressed": COMPRESSED}


def is_structure(structure: Any) -> bool:
    """Whether it is numbers of units by site."""
    return isinstance(structure, dict) and all(
        isinstance(name, str) and isinstance(n, int) and not isinstance(n, bool) and n >= 0
        for name, n in structure.items()
    )


def is_ours(auto_map: Any) -> bool:
    """Whether a config's ``auto_map`` names our module, after the name of a repository or not."""
    classes = auto_map.values() if isinstance(auto_map, dict) else ()
    return bool(classes) and all(str(name).rpartition("--")[2].startswith(f"{MODELING}.") for name in classes)
