"""Find the neurons inside experts: the features between the matrices of each.

As with the experts, what belongs to a neuron is what becomes twice as large when the model's class is built with twice
as many. All experts of a packed tensor have as many neurons, but each may keep others than its neighbours; an expert
that is a module of its own has neurons of its own. What growth does not tell, such as whether gates come before ups or
lie between them, is tried out: every arrangement is given, and the proof decides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_prune.architectures.experts import PackedWeight, packed_weights
from hf_prune.architectures.growth import Growth, built, growth
from hf_prune.architectures.memory import remembered, text_of
from hf_prune.architectures.modules import base_prefix, find_tensor, output_and_input_dim
from hf_prune.architectures.moe_block import MoeBlock
from hf_prune.architectures.moe_blocks import moe_blocks
from hf_prune.architectures.settings import config_of_setting, set_setting
from hf_prune.architectures.unit_groups import FOUND, UnitGroup, UnitSlice, numbered

_HALVES = ("Llama4TextExperts",)  # classes without transformers' decorator that keep all gates before all ups
_STEP = 8  # grouped products read rows of 16 bytes at a time: 8 numbers of bfloat16


@dataclass(frozen=True)
class _Neurons:
    """The neurons of the packed experts of one block, or of one expert; ``config`` is empty if it also counts others.

    Args:
        block: The mixture.
        producers: What computes them.
        consumers: What reads them.
        counts: Attributes of modules that are proportional to their number.
        config: The setting that counts them.
        experts: How many share the tensors; 0 for a single one.
        halves: Whether, in producers with two rows for each, all first ones come before all second ones.
    """

    block: MoeBlock
    producers: tuple[UnitSlice, ...]
    consumers: tuple[UnitSlice, ...]
    counts: tuple[tuple[str, str], ...]
    config: tuple[str, ...]
    experts: int
    halves: bool


_CACHE: dict[tuple[type, str, tuple[MoeBlock, ...]], list[_Neurons]] = {}


def expert_neuron_groups(model: nn.Module) -> list[UnitGroup]:
    """The neurons of experts as groups, in every arrangement that they may have; packed ones with a choice for each.

    Args:
        model: Any model.
    """
    blocks = moe_blocks(model)
    if not blocks:
        return []
    config: Any = model.config
    key = type(model), text_of(config), tuple(blocks)
    neurons = remembered(_CACHE, key, lambda: list(_neurons(model, blocks)))
    prefix = base_prefix(model)
    return [
        _group(model, found, prefix)
        for found in neurons
        if all(find_tensor(model, piece.name) is not None for piece in found.consumers)
    ]


def _neurons(model: nn.Module, blocks: list[MoeBlock]) -> Iterator[_Neurons]:
    plain = built(type(model), model.config)
    packed = {weight.name: weight for weight in packed_weights(plain)}
    remaining = list(blocks)
    for path, number in _sizes(plain, blocks):
        larger = copy.deepcopy(model.config)
        set_setting(larger, path, 2 * number)
        try:
            found = growth(plain, built(type(model), larger), number)
        except Exception:  # the config refuses the number, or sizes elsewhere no longer fit
            continue
        grown = {piece.name for piece in found.parameters}
        elsewhere = {name for name in grown if not any(_is_inside(plain, block, name) for block in blocks)}
        for block in list(remaining):
            if block.router in {*grown, *found.odd}:
                continue  # a router whose rows grow reads the hidden states, and so do the experts along this axis
            neurons = list(_of_block(plain, block, found, number, packed))
            if neurons:
                remaining.remove(block)
                yield from (replace(entry, config=() if elsewhere else (path,)) for entry in neurons)


def _is_inside(model: nn.Module, block: MoeBlock, name: str) -> bool:
    """Whether a parameter is in the experts of a block."""
    holders = {piece.name.rpartition(".")[0] for piece in block.parameters if _is_packed(model, piece)}
    return name.rpartition(".")[0] in holders or name.startswith(tuple(f"{prefix}." for prefix in block.lists))


def _is_packed(model: nn.Module, piece: UnitSlice) -> bool:
    """Whether a parameter holds the matrices of all experts."""
    return model.get_parameter(piece.name).ndim == 3 or piece.width > 1


def _sizes(model: nn.Module, blocks: list[MoeBlock]) -> Iterator[tuple[str, int]]:
    """Settings of the configs that count experts, or of those around them, that hold the size of an axis of some."""
    axes: set[int] = set()
    for block in blocks:
        for piece in block.parameters:
            shape = model.get_parameter(piece.name).shape
            axes |= {*shape[1:]} if len(shape) == 3 else {piece.width} if piece.width > 1 else set()
        for name in block.lists:
            axes |= {size for parameter in model.get_submodule(name).parameters() for size in parameter.shape}
    holders = dict.fromkeys(block.config.rpartition(".")[0] for block in blocks)
    for holder in holders:
        config, _ = config_of_setting(model.config, f"{holder}.x".removeprefix("."))
        for key, value in vars(config).items():
            if isinstance(value, int) and not isinstance(value, bool) and value > 1 and value in axes:
                yield f"{holder}.{key}".removeprefix("."), value


def _of_block(
    plain: nn.Module, block: MoeBlock, found: Growth, number: int, packed: dict[str, PackedWeight]
) -> Iterator[_Neurons]:
    """What grows inside the experts of one block; nothing if those are not their neurons."""
    packs = {piece.name for piece in block.parameters if _is_packed(plain, piece)}
    if not packs <= {piece.name for piece in found.parameters}:
        return
    experts = 0 if block.lists else plain.get_parameter(block.router).shape[0]
    holders = {name.rpartition(".")[0] for name in packs}
    keys = {name: numbered(plain.get_submodule(name)) for name in block.lists}
    number_of = min((len(of_list) for of_list in keys.values()), default=0)
    each = [tuple(f"{name}.{of_list[unit]}." for name, of_list in keys.items()) for unit in range(number_of)]
    for prefixes in each or [()]:
        if prefixes:
            pieces = [piece for piece in found.parameters if piece.name.startswith(prefixes)]
        else:  # of which each expert has as many
            own = [piece for piece in found.parameters if piece.name.rpartition(".")[0] in holders]
            pieces = [_of_slabs(plain, piece, number, experts, packed) for piece in own]
        consumers = tuple(piece for piece in pieces if _reads(plain, piece, packed))
        producers = tuple(piece for piece in pieces if piece not in consumers)
        if (
            not consumers
            or not producers
            or {p.width for p in consumers} != {1}
            or {p.width for p in producers} - {1, 2}
        ):
            continue
        layer = f"{block.layer[0]}.{block.layer[1]}."
        counts = tuple(
            (name, key)
            for name, key in found.counts
            if (f"{name}.".startswith(prefixes) if prefixes else name.startswith(layer) and _is_around(name, holders))
        )
        module: Any = plain.get_submodule(producers[0].name.rpartition(".")[0])
        known = getattr(module, "is_concatenated", True if type(module).__name__ in _HALVES else None)
        is_wide = any(piece.width == 2 for piece in producers)
        for halves in ((known,) if known is not None else (True, False)) if is_wide else (False,):
            yield _Neurons(block, producers, consumers, counts, (), experts, halves)


def _is_around(name: str, holders: set[str]) -> bool:
    """Whether a module is one of some, or holds one of them."""
    return any(f"{holder}.".startswith(f"{name}.") for holder in holders)


def _of_slabs(
    plain: nn.Module, piece: UnitSlice, number: int, experts: int, packed: dict[str, PackedWeight]
) -> UnitSlice:
    """What grows in a parameter of two dimensions, as that of each of its slabs."""
    weight = packed.get(piece.name)
    if weight is None or plain.get_parameter(piece.name).ndim == 3 or piece.dim != 0 or piece.width % experts:
        return piece
    width = piece.width // experts
    return replace(piece, width=width, slab=width * number)


def _reads(plain: nn.Module, piece: UnitSlice, packed: dict[str, PackedWeight]) -> bool:
    """Whether what grows are the inputs of a matrix."""
    holder, _, key = piece.name.rpartition(".")
    module, parameter = plain.get_submodule(holder), plain.get_parameter(piece.name)
    if (weight := packed.get(piece.name)) is not None:
        first = 0 if piece.slab else 1  # the dimension of the slab's first axis
        return piece.dim == first + (weight.layout == "linear")
    if parameter.ndim == 3:  # of a class that is not known: the last one gives the outputs
        matrices = [name for name, other in module.named_parameters(recurse=False) if other.ndim == 3]
        return key == matrices[-1]
    return parameter.ndim == 2 and key == "weight" and piece.dim == output_and_input_dim(module)[1]


def _group(model: nn.Module, found: _Neurons, prefix: str) -> UnitGroup:
    """The neurons of one block or expert, as many as there are by now."""
    down = found.consumers[0]
    tensor = model.get_parameter(down.name)
    units = tensor.shape[down.dim]
    choices = 0
    if found.experts:
        choices = model.get_parameter(found.block.router).shape[0]
        units = units // choices if down.slab else units

    def arranged(piece: UnitSlice) -> UnitSlice:
        if piece.width == 2 and found.halves:
            piece = replace(piece, width=1, offsets=(0, units))
        return replace(piece, slab=units * piece.width * len(piece.offsets)) if piece.slab else piece

    step = _STEP if found.experts else 1
    return UnitGroup(
        name=down.name.removeprefix(prefix) if found.experts else down.name.rpartition(".")[0].removeprefix(prefix),
        kind="neuron",
        units=units,
        producers=tuple(map(arranged, found.producers)),
        consumers=tuple(map(arranged, found.consumers)),
        layers=(found.block.layer,),
        counts=found.counts,
        minimum=min(units, step),
        step=step,
        config=found.config,
        per_unit=(1,) * len(found.config),
        choices=choices,
        origin=FOUND,
    )
