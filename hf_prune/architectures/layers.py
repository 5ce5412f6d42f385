"""The lists of layers that a model has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from hf_prune.architectures.base import Stack
from hf_prune.architectures.entries import entries_of
from hf_prune.architectures.layer_list import LayerList, layer_list
from hf_prune.architectures.modules import base_prefix, find_module, model_type_of
from hf_prune.errors import ArchitectureError
from hf_prune.utils.number_formats import refuse_quantized
from hf_prune.utils.torch_masks import refuse_torch_masks
from hf_prune.utils.wrapping import adapters


def layer_lists(model: nn.Module) -> list[LayerList]:
    """The stacks of layers that a model has; none in a convolutional model.

    Raises:
        ArchitectureError: If its architecture is not registered, or its modules are not where the table says, or carry
            adapters.
        PlanError: If it is quantized, or torch.nn.utils.prune holds masks.
    """
    refuse_quantized(model)
    refuse_torch_masks(model)
    for name in adapters(model).values():
        raise ArchitectureError(
            f"{name or type(model).__name__} carries adapters, which would go on writing into what is taken out: "
            f"expected a plain {type(model).__name__}; merge them first, with hf_prune.merge_lora or "
            f"merge_and_unload(), or prune before get_peft_model()"
        )
    stacks, prefix = [stack for stack in entries_of(model, Stack) if stack.is_list], base_prefix(model)
    lists = []
    for stack in stacks:
        layers = find_module(model, prefix + stack.layers)
        if isinstance(layers, nn.ModuleList | nn.Sequential):
            members = tuple(layers.children())
            fixed = _first_alike(members) if stack.is_found and stack.fixed else stack.fixed
            lists.append(LayerList(prefix + stack.layers, dataclasses.replace(stack, fixed=fixed), members))
    if stacks and not lists:
        raise ArchitectureError(
            f"{type(model).__name__} has no list of layers at {' or '.join(prefix + s.layers for s in stacks)}, where "
            f"the table of architectures expects one for {model_type_of(model)!r}: register it with "
            f"hf_prune.register_architecture under another config.model_type"
        )
    return lists


def modules_outside(model: nn.Module) -> list[LayerList]:
    """Modules that stand in no list of layers, and hold units that discovery found."""
    return [layer_list(model, stack) for stack in entries_of(model, Stack) if not stack.is_list]


def _first_alike(layers: Sequence[nn.Module]) -> int:
    """How many layers at the start have the same parameters, such as those before the first mixture of experts."""
    names = [{name for name, _ in layer.named_parameters()} for layer in layers]
    return next((number for number, of_layer in enumerate(names) if of_layer != names[0]), 1)
