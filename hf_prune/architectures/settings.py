"""Read and write settings of a model's config by dotted names, such as ``"text_config.num_experts"``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_ABSENT = object()  # in place of a setting that the config has not


def config_of_setting(config: Any, name: str) -> tuple[Any, str]:
    """The config that holds a setting, and its attribute there.

    Args:
        config: The model's config.
        name: The setting, with dots between a config and the one inside it.
    """
    *steps, key = name.split(".")
    for step in steps:
        config = getattr(config, step)
    return config, key


def set_setting(config: Any, name: str, value: Any) -> None:
    """Set a setting; arguments as :func:`config_of_setting`."""
    holder, key = config_of_setting(config, name)
    setattr(holder, key, value)


def setting(config: Any, name: str) -> Any:
    """The value of a setting, for :func:`restore_setting`; arguments as :func:`config_of_setting`."""
    holder, key = config_of_setting(config, name)
    return getattr(holder, key, _ABSENT)


def restore_setting(config: Any, name: str, value: Any) -> None:
    """Set a setting to what :func:`setting` gave, or remove it if there was none."""
    holder, key = config_of_setting(config, name)
    if value is not _ABSENT:
        setattr(holder, key, value)
    elif key in vars(holder):
        delattr(holder, key)


def objection_to(config: Any, values: Mapping[str, Any]) -> str | None:
    """What the class of a config says against some settings; None if it accepts them. The config is not changed.

    Several classes want a number of heads that divides the hidden size.

    Args:
        config: The model's config.
        values: Settings by name, as for :func:`config_of_setting`.
    """
    from huggingface_hub.errors import StrictDataclassError

    changed = copy.deepcopy(config)
    parts = {id(changed): changed}  # whose classes are asked: none asks those of the configs inside it
    for name, value in values.items():
        holder, key = config_of_setting(changed, name)
        try:
            getattr(holder, key, None)
        except RuntimeError as error:  # of transformers: layers have it in different sizes
            return str(error).partition(". ")[0]
        setattr(holder, key, value)
        parts[id(holder)] = holder
    try:
        for part in parts.values():
            getattr(part, "validate", bool)()
    except StrictDataclassError as error:
        return str(error.__cause__ or error).strip().splitlines()[-1].strip().rstrip(".")
    return None
