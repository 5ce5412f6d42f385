"""The main sizes of a config, whatever its fields are called: hidden size and number of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HIDDEN = ("hidden_size", "d_model", "dim", "embed_dim", "n_embd", "hidden_dim")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "depth")
_OTHER_LAYERS = ("n_layers", "num_blocks", "n_blocks", "layers", "blocks")  # in configs that have none of these


def whole_number(config: Any, *names: str) -> int | None:
    """The first of some attributes that is a positive whole number."""
    for name in names:
        value = attribute(config, name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def attribute(config: Any, name: str) -> Any:
    """An attribute of a config, None without one; for a config that differs from layer to layer, that of the whole."""
    return vars(config).get(type(config).attribute_map.get(name, name))


def hidden_size(config: Any) -> int | None:
    """The hidden size of a config."""
    return whole_number(config, *_HIDDEN)


def number_of_layers(config: Any) -> int:
    """How many layers a config has; 1 if nothing says so."""
    return whole_number(config, *_LAYERS, *_OTHER_LAYERS) or 1


def first_width(values: Mapping[str, Any]) -> int | None:
    """The width of the first stage."""
    for name in ("embed_dim", "hidden_sizes", "embed_dims", "embed_dim_per_stage", "embedding_size"):
        value = values.get(name)
        if isinstance(value, list | tuple) and value and all(isinstance(item, int) for item in value):
            value = min(value)
        if isinstance(value, int):
            return value
    return None
