"""Read and write settings of a model's config by dotted names, such as ``"text_config.num_experts"``."""

from __future__ import annotations

from typing import Any


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
