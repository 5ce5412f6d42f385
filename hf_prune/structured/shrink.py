"""shrink(): cut out of a model what has been pruned, so that its tensors become smaller and it computes less.

A unit is cut if that changes nothing: if nothing reads what it computes, since all weights that consume it are zero, or
if it only ever computes zero. It does not matter where the zeros came from. A unit that is zero only in part stays. A
layer is removed if it is bypassed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from hf_prune.architectures.base import list_architectures
from hf_prune.architectures.cut_units import cut_units, replace_tensors, smaller_tensors, tensor_cuts
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.architectures.kinds.registry import kind_named
from hf_prune.architectures.layers import layer_lists
from hf_prune.architectures.modules import base_prefix
from hf_prune.architectures.remove_layers import bypassed_names, check_removal, remove_layers
from hf_prune.architectures.unit_groups import UnitGroup, numbered, selected
from hf_prune.errors import ArchitectureError
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.planning.config import PruningConfig
from hf_prune.pruning.mask_store import MaskStore, warn_regrown
from hf_prune.structured.shrink_record import RECORD, layer_of, new_name, record_structure, simplify_config
from hf_prune.utils.offloaded_weights import refuse_offloaded

Model = TypeVar("Model", bound=nn.Module)
Move = tuple[set[str], dict[str, str]]
"""Modules that were taken out, and the new names of others by the old ones."""


@torch.no_grad()
def shrink_modules(model: Model, cuts: list[tuple[str, int, Tensor]] | None = None) -> Model:
    """Remove from a model, in place, every head, neuron, channel and layer that has been pruned as a whole.

    Weights that are zero elsewhere stay, and so do their masks. ``num_parameters()`` falls; the outputs are the same.
    Dense weights that ``keep_dense`` kept are dropped, since they no longer fit.

    Args:
        model: A transformers model of an architecture in the table; see ``hf_prune.register_architecture``.
        cuts: Gets what became smaller, as (parameter or buffer, dimension, positions that stay).

    Returns:
        The same model; ``model.config.pruned_structure`` says what was removed since it was dense.

    Raises:
        ArchitectureError: If its architecture is not registered, or a module cannot be resized, such as one whose
            weight another module uses as well; the model is as before.
        PlanError: If weights are offloaded.
        MaskError: If the masks no longer fit the model.
    """
    refuse_offloaded(model, "shrink()")
    warn_regrown(model, "the heads, neurons and channels that they belong to stay")
    lists = layer_lists(model)
    removed = bypassed_names(lists)
    check_removal(model, lists, removed)
    groups = _groups_that_stay(model, removed)
    before = sum(p.numel() for p in model.parameters())
    units = {group.name: group.units for group in groups}
    kept = {group.name: index for group in groups if (index := surviving_units(model, group)) is not None}
    smaller = smaller_tensors(model, groups, kept)
    if (store := MaskStore.of(model)) is not None:
        store.check(model)
    # Nothing above has changed the model, and nothing below fails.
    MaskStore.detach(model)
    removed_units = _modules_of_units(model, groups, kept)
    units_renamed = replace_tensors(model, groups, kept, smaller)
    if cuts is not None:
        cuts += tensor_cuts(groups, kept)
    renamed = remove_layers(model, lists, removed)
    moves: list[Move] = [(removed_units, units_renamed), (removed, renamed)]
    if store is not None:
        _cut_masks(store, groups, kept)
        for gone, new in moves:
            left = {new_name(n, new): m for n, m in store.masks.packed.items() if layer_of(n, gone) is None}
            store.masks = PackedMasks.sharing(left)
        store.attach(model)
    record_structure(model, before, units, kept, lists, removed, renamed)
    if store is not None and (record := getattr(model.config, RECORD, None)) is not None:
        if store.speed is not None:
            record["speed"] = store.speed.to_dict()
        if store.config is not None:
            record["pruning_config"] = store.config.to_dict()
    simplify_config(model, [_as_it_is_now(group, kept, moves) for group in groups])
    return model


def shrink_without_weights(
    model: nn.Module, kept: Mapping[str, Tensor], removed: Collection[str], config: PruningConfig
) -> tuple[list[tuple[str, int, Tensor]], list[Move]]:
    """Shrink a model on the meta device, in place, as :func:`shrink_modules` does once its units are masked.

    Args:
        model: The model, with all its layers.
        kept: The units that each smaller group keeps, by its name.
        removed: Names of the layers that go.
        config: The settings that chose them.

    Returns:
        What became smaller, as (parameter or buffer, dimension, positions that stay); and the modules that are gone
        with the new names of others by the old ones, for units and then for layers.

    Raises:
        ArchitectureError: If other layers need one that goes; the model is then as it was.
    """
    lists = layer_lists(model)
    check_removal(model, lists, removed)
    groups = _groups_that_stay(model, removed)
    before = sum(p.numel() for p in model.parameters())
    units = {group.name: group.units for group in groups}
    kept = {name: index for name, index in kept.items() if name in units}
    gone = _modules_of_units(model, groups, kept)
    cuts = tensor_cuts(groups, kept)
    units_renamed = replace_tensors(model, groups, kept, smaller_tensors(model, groups, kept))
    renamed = remove_layers(model, lists, removed)
    moves: list[Move] = [(gone, units_renamed), (set(removed), renamed)]
    record_structure(model, before, units, kept, lists, removed, renamed)
    if (record := getattr(model.config, RECORD, None)) is not None:
        record["pruning_config"] = config.to_dict()
    simplify_config(model, [_as_it_is_now(group, kept, moves) for group in groups])
    return cuts, moves


def _groups_that_stay(model: nn.Module, removed: Collection[str]) -> list[UnitGroup]:
    """The groups of units that are not in removed layers alone."""
    return [
        group
        for group in find_unit_groups(model)
        if not group.layers or not all(f"{name}.{number}" in removed for name, number in group.layers)
    ]


def _as_it_is_now(group: UnitGroup, kept: Mapping[str, Tensor], moves: Iterable[Move]) -> UnitGroup:
    """A group after units and layers were cut: with as many units as stay, where they are now.

    Args:
        group: The group before.
        kept: The units that each smaller group keeps, by its name.
        moves: Modules that were removed, and the new names of others by the old ones; one after the other.
    """
    producers, consumers = group.producers, group.consumers
    for gone, renamed in moves:
        producers, consumers = (
            tuple(dataclasses.replace(p, name=new_name(p.name, renamed)) for p in pieces if not layer_of(p.name, gone))
            for pieces in (producers, consumers)
        )
    units = int(kept[group.name].shape[-1]) if group.name in kept else group.units
    return dataclasses.replace(group, units=units, producers=producers, consumers=consumers)


def surviving_units(model: nn.Module, group: UnitGroup) -> Tensor | None:
    """The units of a group that still do something, or have to stay; None if those are all."""
    if group.units == 0:
        return None
    works = ~kind_named(group.kind).silent_units(model, group)
    if group.choices:  # slabs in which fewer units work keep silent ones as well, which change nothing
        number = max(int(works.sum(1).max()), group.minimum)
        number = min(group.units, -(-number // group.step) * group.step)
        order = works.int().sort(dim=1, descending=True, stable=True).indices
        return None if number == group.units else order[:, :number].sort(dim=1).values
    surviving = works.nonzero().reshape(-1)
    if len(surviving) < group.minimum:
        surviving = torch.arange(group.minimum, device=surviving.device)  # silent ones, which change nothing
    return None if len(surviving) == group.units else surviving


def resize(model: nn.Module, units: Mapping[str, int]) -> None:
    """Give the groups of a model whose weights are yet to be loaded other sizes, in place.

    Args:
        model: The model, on the meta device or with weights that do not matter.
        units: Numbers of units by group, as :func:`structure_of` gives them.

    Raises:
        ArchitectureError: If a group is unknown, or has fewer units.
    """
    if not units:
        return
    inner_models = _inner_models(model)
    available = {prefix + group.name: group.units for prefix, (_, groups) in inner_models.items() for group in groups}
    for name, number in units.items():
        if not 0 <= number <= available.get(name, -1):
            expected = f"{available[name]} units" if name in available else "no such group of units"
            raise ArchitectureError(
                f"the checkpoint has {number} units at {name}, and {type(model).__name__} has {expected} there: its "
                f"config and its structure do not belong together, or its kind of unit is not registered here"
            )
    for prefix, (inner, groups) in inner_models.items():
        names = [group.name for group in groups if prefix + group.name in units]
        # On the CPU, since numbers of modules are read from it, and the model may be built on the meta device.
        cut_units(inner, groups, {name: torch.arange(units[prefix + name], device="cpu") for name in names})
        for holder in (holder for group in groups if group.name in names for holder in group.lists):
            # transformers would initialize as many modules as the config counts, before it reads the weights
            setattr(inner.get_submodule(holder.rpartition(".")[0]), "_is_hf_initialized", True)  # noqa: B010


def _modules_of_units(model: nn.Module, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> set[str]:
    """Names of the modules that are units of their own, and do not stay."""
    names = set()
    for group in groups:
        if group.name in kept and group.lists:
            staying = set(kept[group.name].tolist())
            for holder in group.lists:
                keys = numbered(model.get_submodule(holder))
                names |= {f"{holder}.{key}" for unit, key in enumerate(keys) if unit not in staying}
    return names


def remove_bypassed_layers(model: nn.Module) -> None:
    """Remove the bypassed layers from a model whose masks do not matter, in place."""
    lists = layer_lists(model)
    remove_layers(model, lists, bypassed_names(lists))


def structure_of(model: nn.Module, dense: Callable[[], nn.Module]) -> dict[str, int]:
    """The numbers of units that the config does not tell.

    Args:
        model: The model.
        dense: Makes a model of the same class from the config alone; called on the meta device.

    Returns:
        Units by group, for the groups whose size differs.
    """
    with torch.device("meta"):
        expected = dense()
    if _shapes(expected) == _shapes(model):
        return {}  # also of a model of whose units nothing is known
    from_config = _sizes(expected)
    return {name: units for name, units in _sizes(model).items() if units != from_config.get(name)}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def _sizes(model: nn.Module) -> dict[str, int]:
    return {prefix + g.name: g.units for prefix, (_, groups) in _inner_models(model).items() for g in groups}


def _inner_models(model: nn.Module) -> dict[str, tuple[nn.Module, list[UnitGroup]]]:
    """The model and its groups; if the table does not have it, the models inside it that the table has come first."""
    from transformers import PreTrainedModel

    inner_models: dict[str, tuple[nn.Module, list[UnitGroup]]] = {}
    covered: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in covered or not isinstance(module, PreTrainedModel):
            continue
        if module.config.model_type in list_architectures():
            prefix = f"{name}.".removeprefix(base_prefix(model)) if name else ""
            try:
                inner_models[prefix] = module, find_unit_groups(module)
            except ArchitectureError:
                if not name:
                    raise
                continue  # such as a backbone with frozen statistics: nothing was taken out of it
            covered.update(module.modules())
    if "" not in inner_models:
        try:
            groups = find_unit_groups(model)
        except ArchitectureError:
            if not inner_models:
                raise
            groups = []
        known = {_identity(inner, group) for inner, inner_groups in inner_models.values() for group in inner_groups}
        inner_models[""] = model, [group for group in groups if _identity(model, group) not in known]
    return inner_models


def _identity(model: nn.Module, group: UnitGroup) -> tuple[str, int]:
    """What tells a group from all others, in whichever of several nested models it was found."""
    return group.kind, id(model.get_parameter((group.consumers or group.producers)[0].name))


def _cut_masks(store: MaskStore, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> None:
    """Cut the masks as their weights were cut; those that keep everything are dropped."""
    masks = PackedMasks(store.masks)
    for name, dim, index in tensor_cuts(groups, kept):
        if name in masks:
            masks[name] = selected(masks[name], dim, index)
    store.dense = None
    store.masks = PackedMasks.sharing({name: m for name, m in masks.packed.items() if m.kept() < m.numel()})
