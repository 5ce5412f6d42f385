"""Cut units out of a model: slices of its parameters and buffers, and what its modules say of their own sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.kinds.registry import kind_named
from hf_prune.architectures.modules import attribute_holder, attribute_value, find_tensor, set_attribute_value
from hf_prune.architectures.switched_off import cut_lists, switch_on
from hf_prune.architectures.unit_groups import UnitGroup, selected
from hf_prune.errors import ArchitectureError


def cut_units(model: nn.Module, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> None:
    """Cut units out of a model, in place: its parameters, buffers, and what its modules say of their own sizes.

    Args:
        model: The model.
        groups: Groups of it.
        kept: The units to keep, in rising order, by group; groups that are not named keep all.

    Raises:
        ArchitectureError: If a weight is shared with another module; the model is as before.
    """
    replace_tensors(model, groups, kept, smaller_tensors(model, groups, kept))


def tensor_cuts(groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> list[tuple[str, int, Tensor]]:
    """(parameter or buffer, dimension, positions that stay) of everything that becomes smaller."""
    cuts: dict[tuple[str, int], Tensor] = {}
    for group in groups:
        if group.name in kept:
            by_place: dict[tuple[str, int], list[Tensor]] = {}
            for piece in group.slices + group.buffers:
                parts = by_place.setdefault((piece.name, piece.dim), [])
                parts.append(piece.index(kept[group.name]))
                if piece.fixed[1]:
                    parts.append(torch.arange(*piece.fixed[:1], sum(piece.fixed), device=parts[0].device))
            # Parts of several widths of one matrix, such as queries beside fewer keys, are slices of their own.
            for place, parts in by_place.items():
                index = parts[0] if len(parts) == 1 else torch.cat(parts, -1).sort().values
                # Experts and the neurons of those that stay may both be rows of one matrix, as may heads and neurons.
                cuts[place] = index if place not in cuts else index[torch.isin(index, cuts[place])]
    return [(name, dim, index) for (name, dim), index in cuts.items()]


def smaller_tensors(model: nn.Module, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters and buffers that become smaller, by name; the model is not touched."""
    cuts = tensor_cuts(groups, kept)
    refuse_shared(model, (name for name, _, _ in cuts))
    smaller: dict[str, Tensor] = {}
    for name, dim, index in cuts:
        tensor = find_tensor(model, name)
        assert tensor is not None
        current = smaller.get(name, tensor.detach())  # two groups may cut one tensor, along different dimensions
        smaller[name] = selected(current, dim, index)
    return smaller


def refuse_shared(model: nn.Module, names: Iterable[str]) -> None:
    """Make sure that no other module holds parameters that are to become smaller, or go.

    Args:
        model: The model.
        names: Names of parameters, and of buffers.

    Raises:
        ArchitectureError: If one does.
    """
    users: dict[int, list[str]] = {}  # the names under which modules hold each parameter
    for module_name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(f"{module_name}.{key}".removeprefix("."))
    for name in names:
        # Layers may also share a whole module, which has one of several names above.
        sharing = dict.fromkeys([*users.get(id(find_tensor(model, name)), []), name])
        if len(sharing) > 1:
            raise ArchitectureError(
                f"{name} cannot be made smaller: it is shared by {', '.join(sharing)}; give each a weight of "
                f"its own first"
            )


def replace_tensors(
    model: nn.Module, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor], smaller: Mapping[str, Tensor]
) -> dict[str, str]:
    """Put smaller tensors into a model, and correct what its modules say of their sizes.

    Returns:
        New names of modules that are units of their own, by the old ones.
    """
    for name, tensor in smaller.items():
        holder, _, key = name.rpartition(".")
        module = model.get_submodule(holder)
        if key in module._buffers:
            module._buffers[key] = tensor.contiguous()
            continue
        old = module._parameters[key]
        assert old is not None
        module._parameters[key] = nn.Parameter(tensor.contiguous(), requires_grad=old.requires_grad)
        if key == "weight" and tensor.ndim == 2:
            _set_features(module, tensor)
    renamed: dict[str, str] = {}
    counted: dict[tuple[int, str], tuple[Any, str, int]] = {}  # several layers may share the config that counts units
    for group in groups:
        if group.name in kept:
            if not kind_named(group.kind).zeros_suffice:
                switch_on(model, group)
            renamed |= cut_lists(model, group, kept[group.name])
            for module_name, attribute in group.counts:
                owner, key = attribute_holder(model, module_name, attribute)
                number = attribute_value(owner, key) * kept[group.name].shape[-1] // group.units
                counted[id(owner), key] = owner, key, number
    for owner, key, number in counted.values():
        set_attribute_value(owner, key, number)
    return renamed


def _set_features(module: nn.Module, weight: Tensor) -> None:
    """Correct what a module says of its own shape."""
    first, second = weight.shape
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = first, second
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = first, second
    elif hasattr(module, "nx"):  # Conv1D
        setattr(module, "nx", first)  # noqa: B010
        setattr(module, "nf", second)  # noqa: B010
