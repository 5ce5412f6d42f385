"""JSON files: read within limits, since others may have written them, and written as checkpoints have them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError, HfPruneError

_LARGEST_JSON = 1 << 26  # bytes; the index of a very large model has a tenth of this
_CONFIG_TYPES = {
    "architectures": list,
    "auto_map": dict,
    "hf_prune": dict,
    "model_type": str,
    "quantization_config": dict,
}


def read_json_object(
    path: str | os.PathLike[str],
    error: type[HfPruneError] = CheckpointError,
    expected: str = "a whole checkpoint, as save_pretrained writes it",
) -> dict[str, Any]:
    """Read a JSON object from a file that others may have written.

    Args:
        path: The file.
        error: The class of the error to raise.
        expected: What should have been there, for the message about a file that is missing.

    Raises:
        HfPruneError: An ``error``, if the file is missing, unreadable, too large, nested too deeply, or holds anything
            but a JSON object.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(_LARGEST_JSON + 1)
        if len(text) > _LARGEST_JSON:
            raise ValueError(f"it has more than {_LARGEST_JSON:,} bytes")
        values = json.loads(text.decode())
    except FileNotFoundError as missing:
        raise error(f"{path} is missing: expected {expected}") from missing
    except OSError as problem:
        why = "is a folder" if Path(path).is_dir() else f"cannot be read ({problem.strerror or problem})"
        raise error(f"{path} {why}: expected a JSON file; give one that can be read") from problem
    except (RecursionError, ValueError) as problem:
        raise error(f"{path} is damaged and not valid JSON: {problem}; download or save it again") from problem
    if not isinstance(values, dict):
        raise error(
            f"{path} is damaged and holds a JSON {type(values).__name__}: expected an object; download or save it again"
        )
    return values


def read_config(path: str | os.PathLike[str], error: type[HfPruneError] = CheckpointError) -> dict[str, Any]:
    """Read a ``config.json``, and check the types of the values that hf_prune uses.

    Args:
        path: The file.
        error: The class of the error to raise.

    Raises:
        HfPruneError: An ``error``, as of :func:`read_json_object`, or if a value has another type than transformers
            writes.
    """
    config = read_json_object(path, error)
    for key, kind in _CONFIG_TYPES.items():
        value = config.get(key)
        valid = value is None or isinstance(value, kind)
        if not valid or (kind is list and not all(isinstance(item, str) for item in value or ())):
            expected = {dict: "an object", list: "a list of names", str: "a name"}[kind]
            raise error(
                f"{path} is damaged: its {key} is {value!r:.100}, expected {expected}; download or save it again"
            )
    return config


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json`` into the folder of a new checkpoint."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
