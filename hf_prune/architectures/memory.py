"""Remember what was found out about a class of models, up to a number of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def remembered(memory: dict[Key, Value], key: Key, find_out: Callable[[], Value], most: int = 32) -> Value:
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
