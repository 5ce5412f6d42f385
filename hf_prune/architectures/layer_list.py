"""A list of layers in one model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from hf_prune.architectures.base import Stack

# Attributes of a layer's modules that hold the layer's own number.
LAYER_NUMBER = re.compile(r"(layer|block)_(idx|id|num|number|index)|idx")


@dataclass(frozen=True)
class LayerList:
    """The layers of one stack.

    Args:
        name: The list's name in the model.
        stack: Its entry in the table, or what discovery found.
        layers: The layers.
    """

    name: str
    stack: Stack
    layers: tuple[nn.Module, ...]

    def layer_names(self) -> list[str]:
        """The name of each layer in the model."""
        return [f"{self.name}.{number}" for number in range(len(self.layers))]
