"""Remove bypassed layers from the lists of a model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from hf_prune.architectures.base import Stack
from hf_prune.architectures.bypass import is_bypassed
from hf_prune.architectures.discovery.blocks import plain_attributes
from hf_prune.architectures.growth import built
from hf_prune.architectures.layer_list import LayerList, is_layer_number, number_places
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
        if stack.is_found and len(numbers) < len(layers.layers):
            _check_rebuilt(model, layers, numbers)


def _check_rebuilt(model: nn.Module, layers: LayerList, numbers: Sequence[int]) -> None:
    """Make sure that a config of fewer layers describes those that stay, and not what its rules put in their places."""
    model_type = type(model).__name__
    if not layers.stack.config:
        raise ArchitectureError(
            f"no layer of {layers.name} can be removed: nothing in the config of {model_type} counts them as removable "
            f"layers, as `hf-prune inspect` explains; undo it with discard_masks(), or reload the model"
        )
    config: Any = copy.deepcopy(model.config)
    _shorten_config(config, layers.stack, numbers, len(layers.layers))
    rebuilt = built(type(model), config).get_submodule(layers.name)
    whole = [
        *built(type(model), model.config).get_submodule(layers.name).children()
    ]  # in sizes that no cut has changed
    own = number_places(whole)
    for (number, new), old in zip(rebuilt.named_children(), numbers, strict=True):
        other_numbers = len(whole) == len(layers.layers) and plain_attributes(new, own) != plain_attributes(
            whole[old], own
        )
        if other_numbers or _contents(new) != _contents(layers.layers[old]):
            raise ArchitectureError(
                f"layers {sorted(set(range(len(layers.layers))) - set(numbers))} of {layers.name} cannot be removed "
                f"together: {layers.name}.{old} would become layer {number}, where the config of {model_type} has "
                f"another kind of layer; undo it with discard_masks(), and remove others"
            )


def _contents(layer: nn.Module) -> set[Any]:
    """What is in a layer, whatever its sizes: modules, parameters, flags and words.

    A tensor that is an attribute is what a pass has left there, such as the state of a recurrence: None without one.
    """
    return {(name, type(module)) for name, module in layer.named_modules()} | {
        (name, key, None if isinstance(value, Tensor) else value)
        for name, module in layer.named_modules()
        for key, value in (vars(module) | dict.fromkeys(module._parameters)).items()
        if isinstance(value, bool | str | Tensor | type(None)) and key != "training" and not key.startswith("_")
    }


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
    kept = [layers.layers[number] for number in numbers]
    is_sequence = isinstance(getattr(parent, attribute), nn.Sequential)
    setattr(parent, attribute, nn.Sequential(*kept) if is_sequence else nn.ModuleList(kept))
    places = number_places(layers.layers)
    for new, old in enumerate(numbers):
        for name, module in layers.layers[old].named_modules():
            for key, value in list(vars(module).items()):  # by which a cache keeps keys and values, for one
                if type(value) is int and value == old and is_layer_number((name, key), places):
                    setattr(module, key, new)
    _shorten_config(model.config, layers.stack, numbers, total)
    own, counts = getattr(parent, "config", None), ("num_layers", "num_hidden_layers", "n_layers")
    holder_of_count, key_of_count = config_of_setting(model.config, layers.stack.config)
    if own is not None and own is not model.config and own is not holder_of_count:
        _shorten_lists(own, layers.stack, numbers, total)
    for counter in (parent, *([] if own is None or own in (model.config, holder_of_count) else [own])):
        for key in (*counts, key_of_count):
            if getattr(counter, key, None) == total:
                setattr(counter, key, len(numbers))


def _shorten_config(config: Any, stack: Stack, numbers: Sequence[int], total: int) -> None:
    """Write into a model's config which layers of a stack stay."""
    holder, key = config_of_setting(config, stack.config)
    for owner in {id(owner): owner for owner in (config, holder)}.values():
        _shorten_lists(owner, stack, numbers, total)
    setattr(holder, key, len(numbers))


def _shorten_lists(config: Any, stack: Stack, numbers: Sequence[int], total: int) -> None:
    for key in stack.per_layer:
        if isinstance(values := getattr(config, key, None), list) and len(values) == total:
            setattr(config, key, [values[number] for number in numbers])
