"""A list of layers in one model, or modules that stand in no list and hold units as layers do."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from hf_prune.architectures.base import Stack
from hf_prune.architectures.modules import base_prefix

# Attributes of a layer's modules that hold the layer's own number.
LAYER_NUMBER = re.compile(r"(layer|block)_(idx|id|num|number|index)|idx")
Place = tuple[str, str]  # the name of a module in a layer, and an attribute of it


@dataclass(frozen=True)
class LayerList:
    """The layers of one stack.

    Args:
        name: The list's name in the model.
        stack: Its entry in the table, or what discovery found.
        layers: The layers.
        names: The names of modules that stand in no list; empty for a list.
    """

    name: str
    stack: Stack
    layers: tuple[nn.Module, ...]
    names: tuple[str, ...] = ()

    def layer_names(self) -> list[str]:
        """The name of each layer in the model."""
        return list(self.names) or [f"{self.name}.{number}" for number in range(len(self.layers))]


def layer_list(model: nn.Module, stack: Stack) -> LayerList:
    """The layers of a stack in a model that has them; of a stack that is no list, the modules that it names."""
    name = base_prefix(model) + stack.layers
    if stack.is_list:
        return LayerList(name, stack, tuple(model.get_submodule(name).children()))
    pattern = re.compile(r"\d+".join(map(re.escape, name.rstrip(".").split("*"))))
    modules = {key: module for key, module in model.named_modules() if pattern.fullmatch(key)}
    return LayerList(name, stack, tuple(modules.values()), tuple(modules))


def number_places(layers: Sequence[nn.Module]) -> frozenset[Place]:
    """Where the layers of a list keep their own number, whatever it is called; nowhere in a list of one."""
    places = [
        {
            (name, key)
            for name, module in layer.named_modules()
            for key, value in vars(module).items()
            if type(value) is int and value == number and not key.startswith("_")
        }
        for number, layer in enumerate(layers)
    ]
    return frozenset(set.intersection(*places)) if len(places) > 1 else frozenset()


def is_layer_number(place: Place, numbers: Collection[Place]) -> bool:
    """Whether an attribute holds the number of the layer: by its name, or by what :func:`number_places` found."""
    return place in numbers or LAYER_NUMBER.fullmatch(place[1]) is not None


def inside(layer: str, name: str) -> str:
    """The full name of what a layer holds; the layer's name is empty if it is the whole model."""
    return f"{layer}.{name}" if layer else name
