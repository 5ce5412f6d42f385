"""One config from what a caller passed: a config, a number, settings by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_prune.errors import ConfigError
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.presets import resolve_settings


def resolve_config(
    config: PruningConfig | float | None, settings: Mapping[str, Any], *, has_data: bool = False
) -> PruningConfig:
    """One config from what a caller passed.

    Args:
        config: The settings, which are then complete, or just the sparsity.
        settings: Settings by name, in place of, or on top of, ``config``; ``preset`` may be among them.
        has_data: Whether there is calibration data: where nothing names a method, the preset is then ``"balanced"``.

    Raises:
        ConfigError: If a setting is unknown or invalid, or the sparsity is given twice.
    """
    if isinstance(config, PruningConfig):
        return config.replace(**settings) if settings else config
    values = dict(settings)
    if config is not None:
        if "sparsity" in values:
            raise ConfigError(f"sparsity is given twice: {config!r} and {values['sparsity']!r}")
        values["sparsity"] = config
    if name := next((name for name in ("max_drop", "max_flips") if name in values), None):
        raise ConfigError(
            f"{name} is met by scoring models, for which prune() has no labelled data: call hf_prune.find_sparsity or "
            "hf_prune.auto_prune"
        )
    return PruningConfig.from_dict(resolve_settings(values, has_data=has_data))
