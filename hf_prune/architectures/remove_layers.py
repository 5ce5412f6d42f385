"""Remove bypassed layers from the lists of a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from hf_prune.architectures.bypass import is_bypassed
from hf_prune.architectures.layer_list import LayerList
from hf_prune.architectures.modules import base_prefix
from hf_prune.architectures.settings import config_of_setting
from hf_prune.errors import ArchitectureError


def bypassed_names(lists: Sequence[LayerList]) -> set[str]:
    """Names of the layers that are bypassed."""
    return {
        name
        for layers in lists
        for name, layer in zip(layers.layer_names(), layers.layers, strict=True)
        if is_bypassed(layer)
    }


def check_removal(model: nn.Module, lists: Sequence[LayerList], removed: Collection[str]) -> None:
    """Make sure that a model still works without some layers.

    Raises:
        ArchitectureError: If other layers need one of them, or too few would be left.
    """
    staying = {layers.name: _staying(layers, removed) for layers in lists}
    for layers in lists:
        numbers, stack = staying[layers.name], layers.stack
        if numbers[: stack.fixed] != list(range(stack.fixed)) or not numbers:
            first = next(i for i in range(len(layers.layers)) if i not in numbers)
            raise ArchitectureError(
                f"{layers.name}.{first} cannot be removed: other layers of {type(model).__name__} need it; undo it "
                f"with discard_masks(), or reload the model"
            )
        other = base_prefix(model) + (stack.not_below or "")
        if stack.not_below and len(numbers) < len(layers.layers) and len(numbers) < len(staying.get(other, ())):
            raise ArchitectureError(
                f"{layers.name} would be left with {len(numbers)} layers and {other} with {len(staying[other])}: "
                f"transformers cannot generate with such a {type(model).__name__}; remove as many layers of {other}"
            )


def remove_layers(model: nn.Module, lists: Sequence[LayerList], removed: Collection[str]) -> dict[str, str]:
    """Remove layers from their lists, in place, and correct the config and the layers' own numbers.

    Returns:
        The new names of the layers that stay, by the old ones.
    """
    renamed: dict[str, str] = {}
    for layers in lists:
        numbers = _staying(layers, removed)
        renamed |= {f"{layers.name}.{old}": f"{layers.name}.{new}" for new, old in enumerate(numbers)}
        if len(numbers) < len(layers.layers):
            _replace_list(model, layers, numbers)
    return renamed


def _staying(layers: LayerList, removed: Collection[str]) -> list[int]:
    """Numbers of the layers that stay."""
    return [number for number, name in enumerate(layers.layer_names()) if name not in removed]


def _replace_list(model: nn.Module, layers: LayerList, numbers: Sequence[int]) -> None:
    """Replace a list of layers by one with some of them, and everything that counts or numbers them."""
    total = len(layers.layers)
    holder, _, attribute = layers.name.rpartition(".")
    parent = model.get_submodule(holder)
    setattr(parent, attribute, nn.ModuleList([layers.layers[number] for number in numbers]))
    for new, old in enumerate(numbers):
        for module in layers.layers[old].modules():
            if isinstance(getattr(module, "layer_idx", None), int):  # where a cache keeps its keys and values
                setattr(module, "layer_idx", new)  # noqa: B010
    holder_of_count, key_of_count = config_of_setting(model.config, layers.stack.config)
    candidates = (model.config, holder_of_count, getattr(parent, "config", None))
    configs = {id(c): c for c in candidates if c is not None}
    for config in configs.values():
        for key in layers.stack.per_layer:
            if isinstance(values := getattr(config, key, None), list) and len(values) == total:
                setattr(config, key, [values[number] for number in numbers])
    setattr(holder_of_count, key_of_count, len(numbers))
    for counter in (parent, *(c for c in configs.values() if c is not holder_of_count and c is not model.config)):
        for key in ("num_layers", "num_hidden_layers", "n_layers", key_of_count):
            if getattr(counter, key, None) == total:
                setattr(counter, key, len(numbers))
