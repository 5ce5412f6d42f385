"""JSON objects from files that anybody may have written, read within limits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError, HfPruneError

_LARGEST_JSON = 1 << 26  # bytes; the largest, which index the files of a model, have a tenth of it
_CONFIG_TYPES = {
    "architectures": list,
    "auto_map": dict,
    "hf_prune": dict,
    "model_type": str,
    "quantization_config": dict,
}


def read_json_object(path: str | os.PathLike[str], error: type[HfPruneError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in a file that others may have written.

    Args:
        path: The file.
        error: What to raise.

    Raises:
        HfPruneError: Of that class, if the file is missing, cannot be read, is very large or deeply nested, or holds
            something else.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(_LARGEST_JSON + 1)
        if len(text) > _LARGEST_JSON:
            raise ValueError(f"it has more than {_LARGEST_JSON:,} bytes")
        values = json.loads(text.decode())
    except FileNotFoundError as missing:
        raise error(f"{path} is missing: expected a whole checkpoint, as save_pretrained writes it") from missing
    except (OSError, RecursionError, ValueError) as problem:
        raise error(f"{path} is damaged, it is no JSON file: {problem}; download or save it again") from problem
    if not isinstance(values, dict):
        raise error(
            f"{path} is damaged, it holds a JSON {type(values).__name__}: expected an object; download or save it again"
        )
    return values


def read_config(path: str | os.PathLike[str], error: type[HfPruneError] = CheckpointError) -> dict[str, Any]:
    """A ``config.json``, in which what we read has the types that transformers writes; see :func:`read_json_object`.

    Args:
        path: The file.
        error: What to raise.

    Raises:
        HfPruneError: Of that class.
    """
    config = read_json_object(path, error)
    for key, kind in _CONFIG_TYPES.items():
        value = config.get(key)
        right = value is None or isinstance(value, kind)
        if not right or (kind is list and not all(isinstance(each, str) for each in value or ())):
            expected = {dict: "an object", list: "a list of names", str: "a name"}[kind]
            raise error(
                f"{path} is damaged: its {key} is {value!r:.100}, expected {expected}; download or save it again"
            )
    return config
