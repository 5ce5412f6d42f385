"""Find the units and layers of a small model, and prove them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from hf_prune.architectures.base import Stack, Units
from hf_prune.architectures.discovery.blocks import Blocks, find_blocks, matrix_dims
from hf_prune.architectures.discovery.config_fields import with_layer_fields, with_unit_fields
from hf_prune.architectures.discovery.flow import trace_flows
from hf_prune.architectures.discovery.naming import is_in_config, named_units, outside_names
from hf_prune.architectures.discovery.partition import FoundUnits, find_units
from hf_prune.architectures.discovery.proof import groups_in, unit_failure, zero_values
from hf_prune.architectures.discovery.refusals import Refusal
from hf_prune.architectures.discovery.sample import Sample
from hf_prune.architectures.modules import base_prefix
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


def search(sample: Sample) -> Discovery | str:
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
    stacks += _outside_lists(sample, by_layer.get("", ()), dense, refused)
    stacks = with_unit_fields(sample, stacks)
    for number, block_list in enumerate(blocks):
        if not block_list.is_called:
            why = "its layers stay: a layer is not run as a whole, but piece by piece"
            refused[block_list.name] = Refusal(why, "layer")
            continue
        if not block_list.is_residual:
            why = "a layer is run several times, or changes the shape of hidden states"
            refused[block_list.name] = Refusal(why, "layer")
            continue
        inside = (name for name in sample.replaced if name.startswith(f"{block_list.name}."))
        if (name := next(inside, None)) is not None:
            refused[block_list.name] = Refusal(f"its layers stay: {_made_anew(name)}", "layer")
            continue
        stacks[number], reason = with_layer_fields(sample, stacks[number])
        if reason is not None:
            refused[block_list.name] = Refusal(f"its layers stay: {reason}", "layer")
    refused |= _of_torch(sample.model)
    return summary(stacks, refused)


def _of_torch(model: nn.Module) -> dict[str, str]:
    """Why the heads of torch's own attention stay, by the first of several in layers that are alike."""
    names: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            names.setdefault(re.sub(r"\d+", "*", name), name)
    reason = (
        "its heads stay: nn.MultiheadAttention of torch runs only with heads that are as wide as its inputs together"
    )
    return dict.fromkeys(names.values(), Refusal(reason, "head"))


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
        for found in by_layer.get(layer, ()):
            if any(_describes(sample, stack, units, found) for units in proven):
                continue
            units = _proven(sample, layer, stack, found, outside, dense)
            if isinstance(units, Units):
                proven.append(units)
            else:
                refused[found.consumers[0].name.removesuffix(".weight")] = units
    return proven


def _outside_lists(
    sample: Sample, found_units: Sequence[FoundUnits], dense: Sequence[Tensor], refused: dict[str, str]
) -> list[Stack]:
    """The units in modules that stand in no list of layers, each with the module that holds all of it."""
    prefix = base_prefix(sample.model)
    stacks: dict[str, Stack] = {}
    for found in found_units:
        names = [piece.name for piece in found.producers + found.consumers + found.buffers]
        place = _common_holder(names)
        pattern = re.sub(r"\d+", "*", place.removeprefix(prefix))
        stack = stacks.get(pattern, Stack(pattern, (), None, "", is_found=True, is_list=False))
        if any(_describes(sample, stack, units, found) for units in stack.units):
            continue
        units = _proven(sample, place, replace(stack, units=()), found, (), dense)
        if isinstance(units, Units):
            stacks[pattern] = replace(stack, units=(*stack.units, units))
        elif found.width > 1:  # what is not removed of single features are hidden states, for the most part
            refused[found.consumers[0].name.removesuffix(".weight")] = units
    return list(stacks.values())


def _common_holder(names: Sequence[str]) -> str:
    """The name of the innermost module that holds some parameters."""
    paths = [name.split(".")[:-1] for name in names]
    same = itertools.takewhile(lambda words: len(set(words)) == 1, zip(*paths, strict=False))
    path = [words[0] for words in same]
    return ".".join(path[:-1] if path in paths else path)  # what holds the matrices, and not one of them


def _proven(
    sample: Sample,
    layer: str,
    stack: Stack,
    found: FoundUnits,
    outside: Collection[str],
    dense: Sequence[Tensor],
) -> Units | str:
    """Units in words that removing proves, or why none do."""
    reason, zeroed = "", dict[Any, list[Tensor]]()
    for units in named_units(sample.model, layer, found, outside):
        is_global = any(map(is_in_config, units.counts))
        joined = replace(units, shared=True)
        for candidate in [joined] if units.shared or is_global else [units, joined]:
            failure = _failure(sample, replace(stack, units=(candidate,)), found, dense, zeroed)
            if failure is None:
                return _with_values(sample, stack, candidate, found)
            reason = reason or failure  # of the plainest guess
    why = reason or "no attribute tells their number"
    return Refusal(
        f"{found.units} units of width {found.width} were found, but {why}", _kind_refused(sample.model, found)
    )


def _kind_refused(model: nn.Module, found: FoundUnits) -> str:
    """The kind that stays; empty for features beside other matrices, which may be all that is seen of heads."""
    holder = found.consumers[0].name.rpartition(".")[0].rpartition(".")[0]
    own = {piece.name.rpartition(".")[0].rpartition(".")[2] for piece in found.producers + found.consumers}
    children = dict(model.get_submodule(holder).named_children())
    is_alone = all(name in own for name, child in children.items() if matrix_dims(child) is not None)
    return found.kind if found.width > 1 or is_alone else ""


def _failure(
    sample: Sample, stack: Stack, found: FoundUnits, dense: Sequence[Tensor], zeroed: dict[Any, list[Tensor]]
) -> str | None:
    """Why units named in a way do not fit the small model; None if they do."""
    try:
        groups = groups_in(sample.model, stack)
    except ArchitectureError as error:
        return str(error)
    if not groups or any(group.units != found.units for group in groups if group.consumers[0].width == found.width):
        return "their sizes differ between layers"
    names = [piece.name for group in groups for piece in group.slices]
    around = (name for name in sample.replaced if any(piece.startswith(f"{name}.") for piece in names))
    if (name := next(around, None)) is not None:
        return _made_anew(name)
    return unit_failure(sample, groups, dense, zeroed=zeroed)


def _made_anew(name: str) -> str:
    return f"the code makes another {name} from the config when it runs"


def _describes(sample: Sample, stack: Stack, units: Units, found: FoundUnits) -> bool:
    """Whether units that are proven already are those that were found in a layer of another kind."""
    for group in groups_in(sample.model, replace(stack, units=(units,))):
        if found.consumers[0].name in {piece.name for piece in group.consumers}:
            producers = {piece.name for piece in group.producers + group.buffers}
            return {piece.name for piece in found.producers + found.buffers} <= producers
    return False


def _with_values(sample: Sample, stack: Stack, units: Units, found: FoundUnits) -> Units:
    """Units with the producers that silence them."""
    groups = groups_in(sample.model, replace(stack, units=(replace(units, shared=False),)))
    consumer = found.consumers[0].name
    group = next(group for group in groups if consumer in {piece.name for piece in group.consumers})
    names = zero_values(sample, group, consumer.rpartition(".")[0])
    layer = consumer.removesuffix(units.consumers[0].name)
    return replace(units, values=tuple(name.removeprefix(layer) for name in names))


def summary(stacks: Sequence[Stack], refused: Mapping[str, str]) -> Discovery | str:
    """What was found, or a sentence if nothing of it can be removed."""
    useful = tuple(stack for stack in stacks if stack.units or stack.config)
    return Discovery(useful, refused) if useful else f"nothing was found that can be removed{_reasons(refused)}"


def _reasons(refused: Mapping[str, str]) -> str:
    return "".join(f"; {name}: {reason}" for name, reason in list(refused.items())[:3])
