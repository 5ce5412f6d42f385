"""What the config of a shrunk model says of its sizes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.discovery.holders import native_class
from hf_prune.architectures.discovery.sample import FAILURES
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.architectures.kinds.registry import kind_named
from hf_prune.architectures.layer_list import LayerList
from hf_prune.architectures.modules import base_prefix
from hf_prune.architectures.settings import objection_to, restore_setting, setting
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.errors import ArchitectureError

RECORD = "pruned_structure"  # the attribute of the config that says what was done


def layer_of(name: str, layers: Collection[str]) -> str | None:
    """The one of some layers that a module or parameter is in, by its name; None if it is in none of them."""
    return next((name[:end] for end, sign in enumerate(name) if sign == "." and name[:end] in layers), None)


def holding_layers(model: nn.Module, layers: Collection[str]) -> dict[str, set[str | None]]:
    """Which of some layers hold each parameter, None standing for everything else, by its name in the model.

    Layers that share a parameter hold it under names of their own, of which ``named_parameters()`` gives the first.
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    holding: dict[str, set[str | None]] = {name: set() for name in first.values()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holding[first[id(parameter)]].add(layer_of(name, layers))
    return holding


def new_name(name: str, renamed: Mapping[str, str]) -> str:
    """What a parameter is called after layers before its own were removed."""
    old = layer_of(name, renamed)
    return name if old is None else renamed[old] + name.removeprefix(old)


def record_structure(
    model: nn.Module,
    before: int,
    units: Mapping[str, int],
    kept: Mapping[str, Tensor],
    lists: Sequence[LayerList],
    removed: Collection[str],
    renamed: Mapping[str, str],
) -> None:
    """Write into the config what was removed. What earlier calls wrote stays, under the names of now.

    Args:
        model: The model, already shrunk.
        before: How many parameters it had.
        units: How many units each group had.
        kept: The units that each smaller group kept.
        lists: The stacks of layers as they were.
        removed: Names of the layers that were removed.
        renamed: New names of the layers that stay, by the old ones.
    """
    if not kept and not removed:
        return
    prefix = base_prefix(model)
    record = getattr(model.config, RECORD, None) or {"format_version": 1, "parameters_before": before}
    removed_names = {name.removeprefix(prefix) for name in removed}
    new_names = {old.removeprefix(prefix): new.removeprefix(prefix) for old, new in renamed.items()}
    recorded_units = {
        new_name(name, new_names): dict(entry)
        for name, entry in record.get("units", {}).items()
        if layer_of(name, removed_names) is None
    }
    for name, index in kept.items():
        entry = recorded_units.setdefault(new_name(name, new_names), {"before": units[name]})
        entry["kept"] = index.shape[-1]
    recorded_layers: dict[str, Any] = {name: dict(entry) for name, entry in record.get("layers", {}).items()}
    for layers in lists:
        total = len(layers.layers)
        staying = [number for number, name in enumerate(layers.layer_names()) if name not in removed]
        if len(staying) < total:
            name = layers.name.removeprefix(prefix)
            entry = recorded_layers.setdefault(name, {"before": total, "kept": list(range(total))})
            entry["kept"] = [entry["kept"][number] for number in staying]
    setattr(model.config, RECORD, {**record, "units": recorded_units, "layers": recorded_layers})


def simplify_config(model: nn.Module, groups: Sequence[UnitGroup]) -> None:
    """Write sizes into the model's config wherever it can tell them: where all groups that it speaks of are alike.

    Where its class refuses a number, or builds other sizes from it, or groups of which it tells nothing are not found
    by it again, the config stays as it is, and checkpoints tell the sizes by our record.

    Args:
        model: The model, already shrunk.
        groups: Its groups, with the units that they have now.
    """
    by_attributes: dict[tuple[str, ...], list[UnitGroup]] = {}
    for group in groups:
        if group.config:
            by_attributes.setdefault(group.config, []).append(group)
    proven: list[list[UnitGroup]] = []  # groups that were found, whose sizes are written
    before: dict[str, Any] = {}
    for alike in by_attributes.values():
        first = alike[0]
        if first.units and len({(group.units, group.per_unit, group.size) for group in alike}) == 1:
            kind = kind_named(first.kind)
            values = kind.config_values(first)
            if objection_to(model.config, values) is None:
                if first.kind in ("head", "neuron") and all(group.is_found for group in alike):
                    before = {name: setting(model.config, name) for name in values} | before
                    proven.append(alike)
                kind.write_config(model, first)
    found = [group for group in groups if group.is_found and group.kind in ("head", "neuron") and group.units]
    while proven:
        built = [alike for alike in proven if _is_built(model, alike)]
        if len(built) == len(proven):
            told = {group.name for alike in proven for group in alike}
            if _are_found_again(model, [group for group in found if group.name not in told]):
                return
            built = []
        for name, value in before.items():
            restore_setting(model.config, name, value)
        for alike in built:
            kind_named(alike[0].kind).write_config(model, alike[0])
        proven = built


def _are_found_again(model: nn.Module, groups: Sequence[UnitGroup]) -> bool:
    """Whether groups are found by the config as it is now, by which a checkpoint is loaded."""
    if not groups:
        return True
    try:
        units = {piece.name: group.units for group in find_unit_groups(model) for piece in group.consumers}
    except ArchitectureError:
        return False
    return all(units.get(piece.name) == group.units for group in groups for piece in group.consumers)


def _is_built(model: nn.Module, groups: Iterable[UnitGroup]) -> bool:
    """Whether the config of a model builds the sizes that groups have; code may have other fields for some layers."""
    try:
        with torch.device("meta"):
            built = native_class(model)(copy.deepcopy(model.config))
        pieces = [(piece.name, piece.dim) for group in groups for piece in group.slices]
        return all(built.get_parameter(n).shape[d] == model.get_parameter(n).shape[d] for n, d in pieces)
    except FAILURES:
        return False


def is_shrunk(model: nn.Module) -> bool:
    """Whether something was cut out of a model, or out of one inside it."""
    return any(getattr(getattr(module, "config", None), RECORD, None) is not None for module in model.modules())
