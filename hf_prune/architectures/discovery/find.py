"""Find the units and layers of a model of which the table says nothing, and prove them; once for each architecture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from hf_prune.architectures.base import Stack, Units
from hf_prune.architectures.discovery.blocks import Blocks, find_blocks
from hf_prune.architectures.discovery.config_fields import with_layer_fields, with_unit_fields
from hf_prune.architectures.discovery.flow import trace_flows
from hf_prune.architectures.discovery.naming import is_in_config, named_units, outside_names
from hf_prune.architectures.discovery.partition import FoundUnits, find_units
from hf_prune.architectures.discovery.proof import first_line, groups_in, layers_failure, unit_failure, zero_values
from hf_prune.architectures.discovery.sample import FAILURES, Sample, make_sample, plain_surroundings
from hf_prune.architectures.modules import base_prefix
from hf_prune.architectures.small_models import small_config
from hf_prune.errors import ArchitectureError


@dataclass(frozen=True)
class Discovery:
    """What was found in an architecture.

    Args:
        stacks: The lists of layers that hold something that can be removed, as the table would describe them.
        refused: Why something cannot be removed, by the name of what was found.
    """

    stacks: tuple[Stack, ...]
    refused: Mapping[str, str]


_FOUND: dict[tuple[Any, str], Discovery | str] = {}


def discover(model: nn.Module) -> Discovery:
    """What can be removed from a model, found and proven on a small one of the same class and config.

    The result is remembered for each class and small config, so only the first call takes time.

    Args:
        model: A transformers model, on any device; only its class and its config are looked at.

    Raises:
        ArchitectureError: If no small model can be built or run, or nothing in it can be removed.
    """
    reasons = []
    with plain_surroundings():
        for holder in _holders(model):
            found = _remembered(_native_class(holder), holder.config)
            if isinstance(found, Discovery) and holder is not model:
                found = _remembered_with_head(_native_class(model), model.config, found)
            if isinstance(found, Discovery):
                return found
            reasons.append(found)
    model_type = getattr(model.config, "model_type", "")
    raise ArchitectureError(
        f"the table of architectures has no entry for {model_type!r} ({type(model).__name__}), and {reasons[-1]}: say "
        f"where its layers, heads and neurons are with hf_prune.register_architecture({model_type!r}, Stack(...)), "
        f"or its channels with Channels(...), or prune it with another granularity"
    )


def _holders(model: Any) -> list[Any]:
    """The models of which a small one is tried: the base model, which needs no head's inputs, or else the whole."""
    from transformers import PreTrainedModel

    base = model.base_model
    is_base = base is not model and isinstance(base, PreTrainedModel) and not base_prefix(base)
    return [base, model] if is_base else [model]


def _native_class(model: nn.Module) -> Any:
    """The class of transformers that a model is of; ours only adds methods for masks."""
    return next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("hf_prune."))


def _remembered(model_class: Any, config: Any) -> Discovery | str:
    """What was found for a class and config; a sentence if nothing was."""
    try:
        small, key = _small(model_class, config)
    except FAILURES as error:
        return f"no small config could be made of its own ({first_line(error)})"
    if key not in _FOUND:
        try:
            sample = make_sample(model_class, small)
            sample.outputs()
        except FAILURES as error:
            _FOUND[key] = f"a small model of its class could not be run to find them ({first_line(error)})"
        else:
            _FOUND[key] = _discovered(sample)
    return _FOUND[key]


def _small(model_class: Any, config: Any) -> tuple[Any, tuple[Any, str]]:
    """A small config, and by what is remembered what was found for it."""
    small = small_config(config)
    return small, (model_class, json.dumps(small.to_dict(), sort_keys=True, default=str))


def _remembered_with_head(model_class: Any, config: Any, base: Discovery) -> Discovery | str:
    """What holds of what was found in a base model once its head is on it; a sentence if nothing does.

    A head can pick hidden states by the number of a layer: the layers are proven again with it.
    """
    try:
        small, key = _small(model_class, config)
    except FAILURES as error:
        return f"no small config could be made of its own ({first_line(error)})"
    if key not in _FOUND:
        if getattr(small, "pad_token_id", 0) is None:
            small.pad_token_id = 0  # without one, classifiers take one text at a time
        refused, stacks = dict(base.refused), []
        for stack in base.stacks:
            failure = layers_failure(model_class, small, stack) if stack.config else None
            if failure is not None:
                refused[stack.layers] = f"its layers stay: with the head of {model_class.__name__}, {failure}"
                stack = replace(stack, config="", per_layer=(), fixed=0)
            stacks.append(stack)
        _FOUND[key] = _summary(stacks, refused)
    return _FOUND[key]


def _summary(stacks: Sequence[Stack], refused: Mapping[str, str]) -> Discovery | str:
    """What was found, or a sentence if nothing of it can be removed."""
    useful = tuple(stack for stack in stacks if stack.units or stack.config)
    return Discovery(useful, refused) if useful else f"nothing was found that can be removed{_reasons(refused)}"


def _reasons(refused: Mapping[str, str]) -> str:
    return "".join(f"; {name}: {reason}" for name, reason in list(refused.items())[:3])


def _discovered(sample: Sample) -> Discovery | str:
    """Find and prove units, then layers, then what the config can tell of them."""
    blocks, dense = find_blocks(sample), sample.outputs()
    refused: dict[str, str] = {}
    by_layer: dict[str, list[FoundUnits]] = {}
    for layer, flows in trace_flows(sample, blocks).items():
        by_layer[layer], reasons = find_units(sample.model, flows)
        refused |= reasons
    prefix = base_prefix(sample.model)
    outside = {name for layer, units in by_layer.items() for found in units for name in outside_names(layer, found)}
    stacks = []
    for block_list in blocks:
        stack = Stack(block_list.name.removeprefix(prefix), (), None, "", is_found=True)
        units = _proven_units(sample, block_list, stack, by_layer, outside, dense, refused)
        stacks.append(replace(stack, units=tuple(units)))
    stacks = with_unit_fields(sample, stacks)
    for number, block_list in enumerate(blocks):
        if not block_list.is_residual:
            refused[block_list.name] = "a layer is run several times, or changes the shape of hidden states"
            continue
        stacks[number], reason = with_layer_fields(sample, stacks[number])
        if reason is not None:
            refused[block_list.name] = f"its layers stay: {reason}"
    return _summary(stacks, refused)


def _proven_units(
    sample: Sample,
    blocks: Blocks,
    stack: Stack,
    by_layer: Mapping[str, Sequence[FoundUnits]],
    outside: set[str],
    dense: Sequence[Tensor],
    refused: dict[str, str],
) -> list[Units]:
    """The units of a list of layers that removing proves; the others are put among those refused."""
    proven: list[Units] = []
    for number in blocks.kinds():
        layer = f"{blocks.name}.{number}"
        for found in by_layer[layer]:
            consumer = found.consumers[0].name
            if any(_describes(sample, stack, units, number, found) for units in proven):
                continue
            reason = ""
            for units in named_units(sample.model, layer, found, outside):
                is_global = any(map(is_in_config, units.counts))
                joined = replace(units, shared=True)
                for candidate in [joined] if units.shared or is_global else [units, joined]:
                    failure = _failure(sample, replace(stack, units=(candidate,)), found, dense)
                    if failure is None:
                        proven.append(_with_values(sample, stack, candidate, number))
                        break
                    reason = reason or failure  # of the plainest guess
                else:
                    continue
                break
            else:
                refused[consumer.removesuffix(".weight")] = (
                    f"{found.units} units of width {found.width} were found, but "
                    f"{reason or 'no attribute tells their number'}"
                )
    return proven


def _failure(sample: Sample, stack: Stack, found: FoundUnits, dense: Sequence[Tensor]) -> str | None:
    """Why units named in a way do not fit the small model; None if they do."""
    try:
        groups = groups_in(sample.model, stack)
    except ArchitectureError as error:
        return str(error)
    if not groups or any(group.units != found.units for group in groups if group.consumers[0].width == found.width):
        return "their sizes differ between layers"
    return unit_failure(sample, groups, dense)


def _describes(sample: Sample, stack: Stack, units: Units, number: int, found: FoundUnits) -> bool:
    """Whether units that are proven already are those that were found in a layer of another kind."""
    place = base_prefix(sample.model) + stack.layers, number
    for group in groups_in(sample.model, replace(stack, units=(units,))):
        if place in group.layers and found.consumers[0].name in {piece.name for piece in group.consumers}:
            producers = {piece.name for piece in group.producers + group.buffers}
            return {piece.name for piece in found.producers + found.buffers} <= producers
    return False


def _with_values(sample: Sample, stack: Stack, units: Units, number: int) -> Units:
    """Units with the producers that silence them."""
    groups = groups_in(sample.model, replace(stack, units=(replace(units, shared=False),)))
    group = next(group for group in groups if group.layers[0][1] == number)
    consumer = group.consumers[0].name.rpartition(".")[0]
    names = zero_values(sample, group, consumer)
    layer = f"{base_prefix(sample.model)}{stack.layers}.{number}."
    return replace(units, values=tuple(name.removeprefix(layer) for name in names))
