"""Remember what was found out about a class of models, up to a number of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
# What says nothing of the modules: a model that was cut, saved and loaded is remembered as one that its config builds.
_RECORDS = {
    "_name_or_path",
    "architectures",
    "dtype",
    "pruned_structure",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}


def remembered(memory: dict[Key, Value], key: Key, find_out: Callable[[], Value], most: int = 128) -> Value:
    """What is remembered under a key; found out and remembered where it is not.

    Args:
        memory: What is remembered; beyond ``most`` keys, what was found out first is forgotten.
        key: The key.
        find_out: Makes the value.
        most: How many keys are remembered.
    """
    if key not in memory:
        value = find_out()
        while len(memory) >= most:
            del memory[next(iter(memory))]
        memory[key] = value
    return memory[key]


def text_of(config: Any) -> str:
    """A config in words, to remember by: all that may say how a model is built."""
    return json.dumps(_without_records(config.to_dict()), sort_keys=True, default=str)


def _without_records(value: Any, is_config: bool = True) -> Any:
    """A config, and all configs in it, without what says nothing of the modules."""
    if not isinstance(value, Mapping):
        return value
    left_out = _RECORDS if is_config or "model_type" in value else ()
    return {key: _without_records(inner, False) for key, inner in value.items() if key not in left_out}
