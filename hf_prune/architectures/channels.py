"""Channels inside the blocks of convolutional models: where they are, and what has to follow when one is pruned.

A channel whose filter is zero still carries what the next norm adds, a constant. Pruning a channel therefore sets to
zero what the norm does to it as well; then nothing is left of it, and it can be taken out (Liu et al., "Learning
Efficient Convolutional Networks through Network Slimming", arXiv:1708.06519, take channels with their norms too).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hf_prune.architectures.base import Channels
from hf_prune.architectures.unit_groups import UnitGroup, UnitSlice, plain_weights
from hf_prune.errors import ArchitectureError

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def channel_groups(model: nn.Module, entries: Sequence[Channels], prefix: str) -> list[UnitGroup]:
    """The channels that can be taken out of a model.

    Args:
        model: The model.
        entries: What the table of architectures says of it.
        prefix: What comes before the names of modules of the base model.

    Raises:
        ArchitectureError: If a link joins modules that do not fit.
    """
    modules = dict(model.named_modules())
    found = []
    for entry in entries:
        pattern = re.compile(re.escape((prefix + entry.blocks).rstrip(".")).replace(r"\*", r"\d+"))
        for block in [name for name in modules if pattern.fullmatch(name)]:
            for chain, reader in entry.links:
                names = [f"{block}.{name}".lstrip(".") for name in (*chain, reader)]
                if names[0] in modules and names[-1] in modules:
                    found.append(_site(modules, [name for name in names if name in modules], prefix))
    return found


def _site(modules: Mapping[str, nn.Module], names: Sequence[str], prefix: str) -> UnitGroup:
    *chain, reader = names
    tensors = {name: plain_weights(name, modules[name]) for name in names}
    parts = [[UnitSlice(f"{name}.{key}", 0, 1) for key in tensors[name]] for name in chain]
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
        kind="channel",
        layers=(),
        units=units,
        producers=tuple(p for each in parts for p in each),
        consumers=(UnitSlice(f"{reader}.weight", 1, 1),),
        values=tuple(parts[-1]),
        counts=(*counts, (reader, "in_channels" if isinstance(modules[reader], _CONVOLUTIONS) else "in_features")),
        minimum=1,
        config=(),
        per_unit=(),
        size=None,
        buffers=tuple(
            UnitSlice(f"{name}.{key}", 0, 1)
            for name in chain
            for key, b in modules[name]._buffers.items()
            if _is_row(b)
        ),
    )


def _counts(module: nn.Module) -> tuple[str, ...]:
    """The attributes of a module that say how many channels it has."""
    if isinstance(module, _NORMS):
        return ("num_features",)
    if isinstance(module, _CONVOLUTIONS):
        return ("out_channels", "in_channels", "groups") if module.groups > 1 else ("out_channels",)
    return ("out_features",)


def _is_row(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.ndim == 1


# --- pruning them -------------------------------------------------------------------------------------------


def coupled_parameters(sites: Sequence[UnitGroup]) -> set[str]:
    """Parameters that lose the channels that the convolution before them loses.

    Args:
        sites: See :func:`channel_groups`.
    """
    return {part.name for site in sites if site.kind == "channel" for part in site.producers[1:]}


def propagate_channel_masks(
    masks: Mapping[str, Tensor], sites: Sequence[UnitGroup], model: nn.Module
) -> dict[str, Tensor]:
    """Masks, and those of what has to follow.

    Args:
        masks: Bool masks by parameter name, True = keep.
        sites: See :func:`channel_groups`.
        model: The model.
    """
    found = dict(masks)
    for site in sites:
        if site.kind == "channel" and site.producers[0].name in masks:
            kept = masks[site.producers[0].name].flatten(1).any(1)
            for part in site.producers[1:]:
                parameter = model.get_parameter(part.name)
                shape = (-1, *[1] * (parameter.ndim - 1))
                found[part.name] = kept.view(shape).expand(parameter.shape).to(parameter.device).contiguous()
    return found
