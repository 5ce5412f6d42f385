"""Channels inside the blocks of convolutional models, and what has to follow when one is pruned.

A channel whose filter is zero still carries what the next norm adds, a constant. Pruning a channel therefore also zeros
what the norm does to it; then nothing is left of it, and it can be cut (Liu et al., "Learning Efficient Convolutional
Networks through Network Slimming", arXiv:1708.06519, remove channels with their norms too).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hf_prune.architectures.base import Channels, list_architectures
from hf_prune.architectures.entries import entries_of
from hf_prune.architectures.kinds.base import UnitKind, activation_is_zero_at_zero
from hf_prune.architectures.kinds.registry import KINDS
from hf_prune.architectures.modules import base_prefix, model_type_of
from hf_prune.architectures.unit_groups import UnitGroup, UnitSlice, plain_weights
from hf_prune.errors import ArchitectureError
from hf_prune.kernels.packed_masks import PackedMasks

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@KINDS.register("channel")
class Channel(UnitKind):
    """A filter, what norms and depthwise convolutions do to its output, and the weights that read it."""

    name = "channel"
    description = "channels inside the blocks of a convolutional model"
    position = 2
    is_granularity = False  # the granularity of single weights with this name chooses them

    def groups(self, model: nn.Module) -> list[UnitGroup]:
        """See :meth:`UnitKind.groups`."""
        prefix, modules = base_prefix(model), dict(model.named_modules())
        groups = []
        for entry in entries_of(model, Channels):
            pattern = re.compile(re.escape((prefix + entry.blocks).rstrip(".")).replace(r"\*", r"\d+"))
            for block in [name for name in modules if pattern.fullmatch(name)]:
                for chain, reader in entry.links:
                    names = [f"{block}.{name}".lstrip(".") for name in (*chain, reader)]
                    if names[0] in modules and names[-1] in modules:
                        groups.append(_link(modules, [name for name in names if name in modules], prefix))
        return groups

    def silent_units(self, model: nn.Module, group: UnitGroup) -> Tensor:
        """See :meth:`UnitKind.silent_units`; an activation stands between a channel and what reads it."""
        if activation_is_zero_at_zero(model):
            return super().silent_units(model, group)
        return group.is_zero(model, group.consumers)


def _link(modules: Mapping[str, nn.Module], names: Sequence[str], prefix: str) -> UnitGroup:
    """The channels that a chain of modules computes for the last one."""
    *chain, reader = names
    tensors = {name: plain_weights(name, modules[name]) for name in names}
    slices = [tuple(UnitSlice(f"{name}.{key}", 0, 1) for key in tensors[name]) for name in chain]
    lengths = {f"{name}.{key}": len(tensor) for name in chain for key, tensor in tensors[name].items()}
    units = tensors[reader]["weight"].shape[1]
    if set(lengths.values()) != {units} or getattr(modules[reader], "groups", 1) != 1:
        raise ArchitectureError(
            f"{reader} reads {units} channels, and what computes them has {lengths}: expected as many everywhere, and "
            f"one group; its entry in the table of architectures does not fit"
        )
    counts = [(name, key) for name in chain for key in _counts(modules[name])]
    return UnitGroup(
        name=reader.removeprefix(prefix),
        kind=Channel.name,
        units=units,
        producers=tuple(piece for of_module in slices for piece in of_module),
        consumers=(UnitSlice(f"{reader}.weight", 1, 1),),
        values=slices[-1],
        counts=(*counts, (reader, "in_channels" if isinstance(modules[reader], _CONVOLUTIONS) else "in_features")),
        minimum=1,
        buffers=tuple(
            UnitSlice(f"{name}.{key}", 0, 1)
            for name in chain
            for key, buffer in modules[name]._buffers.items()
            if buffer is not None and buffer.ndim == 1
        ),
    )


def _counts(module: nn.Module) -> tuple[str, ...]:
    """The attributes of a module that say how many channels it has."""
    if isinstance(module, _NORMS):
        return ("num_features",)
    if isinstance(module, _CONVOLUTIONS):
        return ("out_channels", "in_channels", "groups") if module.groups > 1 else ("out_channels",)
    return ("out_features",)


# --- pruning them -------------------------------------------------------------------------------------------


def find_channel_groups(model: nn.Module) -> list[UnitGroup]:
    """The channels of a model that can be cut; none if its architecture is not registered."""
    return Channel().groups(model) if model_type_of(model) in list_architectures() else []


def coupled_parameters(groups: Sequence[UnitGroup]) -> set[str]:
    """Parameters that lose the channels that the convolution before them loses.

    Args:
        groups: See :func:`find_channel_groups`.
    """
    return {piece.name for group in groups for piece in group.producers[1:]}


def propagate_channel_masks(masks: Mapping[str, Tensor], groups: Sequence[UnitGroup], model: nn.Module) -> PackedMasks:
    """Masks, and those of what has to follow.

    Args:
        masks: Bool masks by parameter name, True = keep.
        groups: See :func:`find_channel_groups`.
        model: The model.
    """
    propagated = PackedMasks(masks)
    for group in groups:
        if group.producers[0].name in masks:
            kept = masks[group.producers[0].name].flatten(1).any(1)
            for piece in group.producers[1:]:
                parameter = model.get_parameter(piece.name)
                shape = (-1, *[1] * (parameter.ndim - 1))
                propagated[piece.name] = kept.view(shape).expand(parameter.shape).to(parameter.device).contiguous()
    return propagated
