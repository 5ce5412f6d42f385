"""Find the neurons inside packed experts: the features between the two matrices of each.

As with the experts, what belongs to a neuron is what becomes twice as large when the model's class is built with twice
as many. All experts of a tensor have as many neurons, but each may keep others than its neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_prune.architectures.growth import Growth, built, growth
from hf_prune.architectures.modules import base_prefix
from hf_prune.architectures.moe_block import MoeBlock
from hf_prune.architectures.moe_blocks import moe_blocks
from hf_prune.architectures.settings import config_of_setting, set_setting
from hf_prune.architectures.unit_groups import UnitGroup, UnitSlice

_HALVES = ("Llama4TextExperts",)  # classes without transformers' decorator that keep all gates before all ups
_MOST_CACHED = 16
_STEP = 8  # grouped products read rows of 16 bytes at a time: 8 numbers of bfloat16


@dataclass(frozen=True)
class _Neurons:
    """The neurons of the experts of one block; ``config`` is empty if it also counts others."""

    block: MoeBlock
    producers: tuple[UnitSlice, ...]
    consumers: tuple[UnitSlice, ...]
    counts: tuple[tuple[str, str], ...]
    config: tuple[str, ...]


_CACHE: dict[tuple[type, str, tuple[MoeBlock, ...]], list[_Neurons]] = {}


def expert_neuron_groups(model: nn.Module) -> list[UnitGroup]:
    """The neurons of packed experts, as groups with a choice for each expert; none of other mixtures.

    Args:
        model: Any model.
    """
    blocks = moe_blocks(model)
    if not blocks:
        return []
    config: Any = model.config
    key = type(model), config.to_json_string(use_diff=False), tuple(blocks)
    if key not in _CACHE:
        while len(_CACHE) >= _MOST_CACHED:
            del _CACHE[next(iter(_CACHE))]
        _CACHE[key] = list(_neurons(model, blocks))
    prefix = base_prefix(model)
    return [_group(model, found, prefix) for found in _CACHE[key]]


def _neurons(model: nn.Module, blocks: list[MoeBlock]) -> Iterator[_Neurons]:
    plain = built(type(model), model.config)
    remaining = [block for block in blocks if not block.lists]
    for path, number in _sizes(plain, blocks):
        larger = copy.deepcopy(model.config)
        set_setting(larger, path, 2 * number)
        try:
            found = growth(plain, built(type(model), larger), number)
        except Exception:  # the config refuses the number, or sizes elsewhere no longer fit
            continue
        for block in list(remaining):
            neurons = _of_block(plain, block, found, path, number)
            if neurons is not None:
                remaining.remove(block)
                yield neurons


def _sizes(model: nn.Module, blocks: list[MoeBlock]) -> Iterator[tuple[str, int]]:
    """Settings beside those that count experts, or around them, that hold the size of an axis of packed experts."""
    axes = {
        size
        for block in blocks
        for piece in block.parameters
        if (tensor := model.get_parameter(piece.name)).ndim == 3
        for size in tensor.shape[1:]
    }
    for holder in dict.fromkeys(block.config.rpartition(".")[0] for block in blocks):
        config, _ = config_of_setting(model.config, f"{holder}.x".removeprefix("."))
        for key, value in vars(config).items():
            if isinstance(value, int) and not isinstance(value, bool) and value > 1 and value in axes:
                yield f"{holder}.{key}".removeprefix("."), value


def _of_block(plain: nn.Module, block: MoeBlock, found: Growth, path: str, number: int) -> _Neurons | None:
    """What grows inside the packed tensors of one block; None if those are not the neurons of its experts."""
    packed = {piece.name for piece in block.parameters if plain.get_parameter(piece.name).ndim == 3}
    holders = {name.rpartition(".")[0] for name in packed}
    inside = [piece for piece in found.parameters if piece.name.rpartition(".")[0] in holders]
    grown = {piece.name for piece in inside}
    others = {piece.name for piece in found.parameters} - grown
    if not packed or len(holders) > 1 or not packed <= grown or block.router in others | set(found.odd):
        return None  # a router whose rows grow reads the hidden states, and so do the experts along this axis
    module = plain.get_submodule(next(iter(holders)))
    pieces = [_placed(module, piece, number) for piece in inside]
    down = [piece for piece in pieces if piece is not None and piece.name.endswith(".down_proj")]
    if None in pieces or len(down) != 1 or down[0].width != 1:
        return None
    elsewhere = {name for name in others if not _is_packed_like(plain, name)}
    return _Neurons(
        block,
        producers=tuple(piece for piece in pieces if piece is not None and piece not in down),
        consumers=tuple(down),
        counts=tuple((name, key) for name, key in found.counts if name in holders),
        config=() if elsewhere else (path,),
    )


def _placed(module: Any, piece: UnitSlice, number: int) -> UnitSlice | None:
    """Where the neurons lie along an axis: gates before ups, or one after the other in turns."""
    if piece.width == 1:
        return piece
    halves = getattr(module, "is_concatenated", True if type(module).__name__ in _HALVES else None)
    if piece.width != 2 or halves is None:
        return None
    return replace(piece, width=1, offsets=(0, number)) if halves else piece


def _is_packed_like(plain: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to packed experts of another layer, whose neurons are counted by the same setting."""
    module = plain.get_submodule(name.rpartition(".")[0])
    return any(parameter is not None and parameter.ndim == 3 for parameter in module._parameters.values())


def _group(model: nn.Module, found: _Neurons, prefix: str) -> UnitGroup:
    """The neurons of one block, as many as its experts have by now."""
    (down,) = found.consumers
    shape = model.get_parameter(down.name).shape
    units = shape[down.dim]
    halves = tuple(replace(p, offsets=(0, units)) if len(p.offsets) == 2 else p for p in found.producers)
    return UnitGroup(
        name=down.name.removeprefix(prefix),
        kind="neuron",
        units=units,
        producers=halves,
        consumers=found.consumers,
        layers=(found.block.layer,),
        counts=found.counts,
        minimum=min(units, _STEP),
        step=_STEP,
        config=found.config,
        per_unit=(1,) * len(found.config),
        choices=shape[0],
        origin="read off the class",
    )
