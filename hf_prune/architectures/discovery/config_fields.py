"""Find the attributes of a config that say how many heads, neurons and layers a model has, by changing them."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_prune.architectures.base import Stack, Units
from hf_prune.architectures.cut_units import cut_units
from hf_prune.architectures.discovery.blocks import kind_of
from hf_prune.architectures.discovery.proof import (
    computes_the_same,
    groups_in,
    layers_failure,
    rebuilt_model,
)
from hf_prune.architectures.discovery.sample import FAILURES, Sample
from hf_prune.architectures.found_units import find_attribute
from hf_prune.architectures.layer_list import layer_list, number_places
from hf_prune.architectures.remove_layers import remove_layers
from hf_prune.architectures.settings import config_of_setting, set_setting
from hf_prune.architectures.unit_groups import UnitGroup

_ANY = re.compile(r"\w+")
_LAYERS = re.compile(r"\w*(layer|depth|block|n_blocks)\w*")
_HEADS = re.compile(r"\w*(head|group|n_kv)\w*")
_SIZES = re.compile(r"\w*(head_dim|head_size|d_kv|d_head|dim_head|head_features)\w*")


def with_unit_fields(sample: Sample, stacks: Sequence[Stack]) -> list[Stack]:
    """Stacks whose units name the attributes of the config that can tell another number of them, if there are any."""
    stacks = list(stacks)
    done: set[tuple[str, Units]] = set()
    for stack in list(stacks):
        for units in stack.units:
            if (stack.layers, units) in done:
                continue
            for change, narrow, config_size in _changes(sample, stack, units):
                changed = _units_that_follow(sample, stacks, change)
                if (stack.layers, units) not in changed or len({other.kind for _, other in changed}) > 1:
                    continue
                if config_size and not all(other.size for _, other in changed):
                    continue
                fields = tuple(name for name in change if name != config_size)
                stacks = [_with_fields(s, changed, fields, narrow, config_size) for s in stacks]
                done |= changed
                break
    return stacks


def _with_fields(
    stack: Stack,
    changed: Collection[tuple[str, Units]],
    fields: tuple[str, ...],
    narrow: tuple[bool, ...],
    config_size: str | None,
) -> Stack:
    """A stack of which some units name the attributes of the config."""
    units = tuple(
        replace(u, config=fields, narrow=narrow, config_size=config_size) if (stack.layers, u) in changed else u
        for u in stack.units
    )
    return replace(stack, units=units)


def with_layer_fields(sample: Sample, stack: Stack) -> tuple[Stack, str | None]:
    """A stack with the attribute of the config that counts its layers, or without one and the reason why."""
    layers = layer_list(sample.model, stack)
    total = len(layers.layers)
    if total < 2:
        return stack, "the small model has one layer only, so removing it proves nothing"
    unknown = reason = "no attribute of the config gives their number"
    own = _own_config(sample.model, layers.name)
    usual = _names(sample.model.config, total, _LAYERS, own)
    others = [name for name in _names(sample.model.config, total, _ANY, own) if name not in usual]
    for number, name in enumerate([*usual, *others]):
        if number == len(usual) and reason != unknown:
            break  # a usual name counts them, and they stay for the reason that was found
        holder, _ = config_of_setting(sample.model.config, name)
        lists = tuple(key for key, value in vars(holder).items() if isinstance(value, list) and len(value) == total)
        if number >= len(usual) and lists:
            continue  # these may count them alone, and the attribute something else
        for fixed in (0, 1):
            counted = replace(stack, config=name, per_layer=lists, fixed=fixed)
            twin = sample.twin()
            try:
                remove_layers(twin, [layer_list(twin, counted)], {f"{layers.name}.{fixed}"})
            except FAILURES:
                break
            rebuilt = rebuilt_model(twin)
            if rebuilt is None or len(layer_list(rebuilt, counted).layers) != total - 1:
                break  # an attribute that gives another number
            if not computes_the_same(sample, twin, rebuilt) or not (lists or _is_regular(sample, counted, total)):
                reason = f"the config tells by the number of a layer what is in it (with {name} lowered)"
                continue
            failure = layers_failure(type(sample.model), sample.model.config, counted)
            if failure is None:
                return counted, None
            reason = failure
    return stack, reason


def _is_regular(sample: Sample, stack: Stack, total: int) -> bool:
    """Whether further layers of a longer model would be alike, so that any of them can go."""
    twin = sample.twin()
    set_setting(twin.config, stack.config, total + 3)
    rebuilt = rebuilt_model(twin)
    if rebuilt is None:
        return False
    layers = layer_list(rebuilt, stack).layers
    numbers = number_places(layers)
    return len({kind_of(layer, numbers) for layer in layers[stack.fixed :]}) == 1


def _changes(
    sample: Sample, stack: Stack, units: Units
) -> Iterator[tuple[dict[str, int], tuple[bool, ...], str | None]]:
    """Settings of the config that might halve the number of some units, with what they say of it."""
    group = next(group for group in groups_in(sample.model, replace(stack, units=(units,))) if group.units > 1)
    config, number, fewer = sample.model.config, group.units, max(group.units // 2, 1)
    own = _own_config(sample.model, layer_list(sample.model, stack).layer_names()[0])
    if units.kind == "neuron":
        for name in _names(config, number, _ANY, own):
            yield {name: fewer}, (False,), None
        for name in _names(config, None, re.compile(r"\w*(inner|ffn|intermediate|mlp)\w*"), own):
            yield {name: fewer}, (False,), None
        return
    if group.size is None and units.size is None:
        return
    size = _size(sample.model, group, units)
    per_unit = group.consumers[0].width // size if size else 1
    if not size:
        return
    for queries in _names(config, number * per_unit, _HEADS, own):
        keys = [name for name in _names(config, number, _HEADS, own) if name != queries]
        holder = queries.rpartition(".")[0]
        sizes = [*_names(config, size, _SIZES, own), f"{holder}.head_dim".removeprefix(".")]
        for own_size in dict.fromkeys(sizes):
            for key in [*keys, None]:
                if key is None and per_unit > 1:
                    continue
                change = {queries: fewer * per_unit, **({} if key is None else {key: fewer}), own_size: size}
                yield change, (True, False)[: len(change) - 1], own_size


def _own_config(model: Any, name: str) -> str:
    """Where in the config of a model the config of the part is that a module lies in, with a dot; empty if unknown."""
    from transformers import PreTrainedConfig

    names = name.split(".")
    for end in range(len(names), 0, -1):
        config = getattr(model.get_submodule(".".join(names[:end])), "config", None)
        if isinstance(config, PreTrainedConfig) and config is not model.config:
            keys = [key for key, value in vars(model.config).items() if value is config]
            return f"{keys[0]}." if keys else ""
    return ""


def _size(model: nn.Module, group: UnitGroup, units: Units) -> int | None:
    """The size of a head."""
    layer = group.consumers[0].name.removesuffix(units.consumers[0].name)
    return find_attribute(model, f"{layer}{units.size}")


def _units_that_follow(sample: Sample, stacks: Sequence[Stack], change: Mapping[str, int]) -> set[tuple[str, Units]]:
    """The units, by stack, of which the config has fewer after a change; empty if it changes anything else."""
    twin = sample.twin()
    try:
        config = copy.deepcopy(sample.model.config)
        for name, value in change.items():
            set_setting(config, name, value)
        twin.config = config
        rebuilt = rebuilt_model(twin)
        if rebuilt is None:
            return set()
        followers: set[tuple[str, Units]] = set()
        for stack in stacks:
            for units in stack.units:
                alone = replace(stack, units=(units,))
                after = {group.name: group.units for group in groups_in(rebuilt, alone)}
                groups = [g for g in groups_in(sample.model, alone) if after.get(g.name, g.units) < g.units]
                if groups:
                    followers.add((stack.layers, units))
                    cut_units(twin, groups, {group.name: torch.arange(after[group.name]) for group in groups})
        return followers if followers and computes_the_same(sample, twin, rebuilt) else set()
    except FAILURES:
        return set()


def _names(config: Any, value: int | None, pattern: re.Pattern[str], own: str = "") -> list[str]:
    """Attributes of a config and of configs in it that have a value, by dotted name; those that begin with ``own``."""
    from transformers import PreTrainedConfig

    names = []
    for key, found in vars(config).items():
        if isinstance(found, PreTrainedConfig):
            names += [f"{key}.{name}" for name in _names(found, value, pattern)]
        elif key.startswith("_") or isinstance(found, bool):
            continue
        elif (found == value if value is not None else found is None) and pattern.fullmatch(key):
            names.append(key)
    return [name for name in names if name.startswith(own)]
