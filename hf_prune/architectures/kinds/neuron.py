"""Neurons: the features between the matrices of a feed-forward network."""

from __future__ import annotations

from torch import Tensor, nn

from hf_prune.architectures.base import Neurons
from hf_prune.architectures.discovery.proven_experts import proven_neurons
from hf_prune.architectures.found_units import found_groups, groups_outside
from hf_prune.architectures.kinds.base import UnitKind, activation_is_zero_at_zero
from hf_prune.architectures.kinds.registry import KINDS
from hf_prune.architectures.layer_list import LayerList
from hf_prune.architectures.layers import layer_lists, modules_outside
from hf_prune.architectures.modules import (
    base_prefix,
    expected_module,
    find_module,
    input_count,
    input_slice,
    output_slices,
)
from hf_prune.architectures.siblings import with_siblings
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.errors import ArchitectureError


@KINDS.register("neuron")
class Neuron(UnitKind):
    """An output of the first matrix (of both in a gated network), and the input of the second that reads it."""

    name = "neuron"
    description = "neurons between the matrices of a feed-forward network"
    position = 1
    fine_shares = (0.0, 0.0625, 0.125, 0.25, 0.5, 0.75)
    coarse_shares = (0.0, 0.125, 0.5)

    def groups(self, model: nn.Module) -> list[UnitGroup]:
        """See :meth:`UnitKind.groups`."""
        groups = []
        for layers in layer_lists(model):
            if (neurons := layers.stack.neurons) is not None:
                groups += [_network(model, layers, number, neurons) for number in range(len(layers.layers))]
            groups += found_groups(model, with_siblings(model, layers), self.name)
        groups += groups_outside(model, modules_outside(model), self.name)
        return groups + proven_neurons(model)[0]

    def obstacles(self, model: nn.Module) -> list[str]:
        """See :meth:`UnitKind.obstacles`."""
        return proven_neurons(model)[1]

    def silent_units(self, model: nn.Module, group: UnitGroup) -> Tensor:
        """See :meth:`UnitKind.silent_units`; a gated neuron is zero as soon as one of its two factors is."""
        if group.is_found:  # the activation may be another one than the config's
            return super().silent_units(model, group)
        silent = group.is_zero(model, group.consumers)
        if activation_is_zero_at_zero(model):
            for weight in group.producers:
                if weight.name.endswith(".weight"):
                    bias_name = weight.name.removesuffix("weight") + "bias"
                    bias = [piece for piece in group.producers if piece.name == bias_name]
                    silent |= group.is_zero(model, (weight, *bias))
        return silent


def _network(model: nn.Module, layers: LayerList, number: int, neurons: Neurons) -> UnitGroup:
    """The neurons of one layer."""
    layer = f"{layers.name}.{number}"
    ups = [name for name in (f"{layer}.{up}" for up in neurons.up) if find_module(model, name) is not None]
    down = f"{layer}.{neurons.down}"
    if not ups:
        raise ArchitectureError(
            f"{layer} of {type(model).__name__} has none of {', '.join(neurons.up)}, where the table of architectures "
            f"expects its feed-forward network: register the architecture under another config.model_type"
        )
    units = input_count(model, down)
    return UnitGroup(
        name=down.removeprefix(base_prefix(model)),
        kind=Neuron.name,
        layers=((layers.name, number),),
        units=units,
        producers=tuple(piece for name in ups for piece in output_slices(model, name, units, 1)),
        consumers=(input_slice(model, down, units, 1),),
        # Conv1D cannot flatten an empty tensor.
        minimum=0 if isinstance(expected_module(model, down), nn.Linear) else 1,
        config=(neurons.config,),
        per_unit=(1,),
    )
