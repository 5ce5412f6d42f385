"""Whole layers. A layer is not sliced but bypassed, and then taken out of its list."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hf_prune.architectures.kinds.base import UnitKind
from hf_prune.architectures.kinds.registry import KINDS
from hf_prune.architectures.layers import layer_lists


@KINDS.register("layer")
class Layer(UnitKind):
    """A layer of a stack, with everything in it."""

    name = "layer"
    description = "whole layers, which are bypassed"
    position = 3
    scopes = frozenset({"global"})  # a layer cannot lose the same share as every other one
    objectives = frozenset({"layer"})  # a removed layer has no outputs to compare with the dense model's
    trained_with_masks = False  # a bypass changes what a model computes at once

    def removable_layers(self, model: nn.Module, is_excluded: Callable[[str], bool]) -> list[str]:
        """See :meth:`UnitKind.removable_layers`; one layer of each stack stays."""
        names: list[str] = []
        for layers in layer_lists(model):
            # transformers could not generate if only this list became shorter, so it stays as long as it is.
            candidates = (
                [] if layers.stack.not_below or not layers.stack.config else layers.layer_names()[layers.stack.fixed :]
            )
            allowed = [name for name in candidates if not is_excluded(name)]
            names += allowed[1:] if len(allowed) == len(layers.layers) else allowed
        return names
