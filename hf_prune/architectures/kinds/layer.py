"""Whole layers. A layer is not sliced but bypassed, and then taken out of its list."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from hf_prune.architectures.discovery.find import layers_obstacle
from hf_prune.architectures.entries import is_in_table
from hf_prune.architectures.kinds.base import UnitKind
from hf_prune.architectures.kinds.registry import KINDS
from hf_prune.architectures.layer_list import LayerList
from hf_prune.architectures.layers import layer_lists


@KINDS.register("layer")
class Layer(UnitKind):
    """A layer of a stack, with everything in it."""

    name = "layer"
    description = "whole layers, which are bypassed"
    position = 3
    scopes = frozenset({"global"})  # a layer cannot lose the same share as every other one
    objectives = frozenset({"layer"})  # a removed layer has no outputs to compare with the dense model's
    preferred = "greedy"
    trained_with_masks = False  # a bypass changes what a model computes at once

    def removable_layers(self, model: nn.Module, is_excluded: Callable[[str], bool]) -> list[str]:
        """See :meth:`UnitKind.removable_layers`; one layer of each stack stays."""
        names: list[str] = []
        for layers in layer_lists(model):
            if _obstacle(model, layers) is not None:
                continue
            # transformers could not generate if only this list became shorter, so it stays as long as it is.
            candidates = (
                [] if layers.stack.not_below or not layers.stack.config else layers.layer_names()[layers.stack.fixed :]
            )
            allowed = [name for name in candidates if not is_excluded(name)]
            names += allowed[1:] if len(allowed) == len(layers.layers) else allowed
        return names

    def obstacles(self, model: nn.Module) -> list[str]:
        """See :meth:`UnitKind.obstacles`."""
        lists = layer_lists(model) if is_in_table(model) else []
        reasons = [(layers.name, _obstacle(model, layers)) for layers in lists]
        return [f"the layers of {name} stay: {reason}" for name, reason in reasons if reason is not None]


def _obstacle(model: nn.Module, layers: LayerList) -> str | None:
    """Why the layers of a list that the table names stay; what discovery found is proven already."""
    stack = layers.stack
    if stack.is_found or not stack.config or stack.not_below or not isinstance(model, PreTrainedModel):
        return None
    return layers_obstacle(model, stack) if is_in_table(model) else None
