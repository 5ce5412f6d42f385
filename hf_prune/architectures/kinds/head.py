"""Attention heads; with grouped queries, groups of a key head and its query heads."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from hf_prune.architectures.base import Heads
from hf_prune.architectures.found_units import found_groups, groups_outside, joined_groups
from hf_prune.architectures.kinds.base import UnitKind
from hf_prune.architectures.kinds.registry import KINDS
from hf_prune.architectures.layer_list import LayerList
from hf_prune.architectures.layers import layer_lists, modules_outside
from hf_prune.architectures.modules import base_prefix, expected_module, input_slice, output_count, output_slices
from hf_prune.architectures.siblings import with_siblings
from hf_prune.architectures.unit_groups import UnitGroup, UnitSlice, plain_weights


@KINDS.register("head")
class Head(UnitKind):
    """The outputs of the projections of one head, and the inputs of the output projection that read it."""

    name = "head"
    description = "attention heads, of grouped queries the whole group"
    position = 0

    def groups(self, model: nn.Module) -> list[UnitGroup]:
        """See :meth:`UnitKind.groups`."""
        groups = []
        for layers in layer_lists(model):
            every = range(len(layers.layers))
            for number in every:
                for heads in layers.stack.attentions:
                    if not heads.shared:
                        groups.append(_attention(model, layers, number, heads))
                    elif number == 0:
                        groups.append(joined_groups([_attention(model, layers, i, heads) for i in every]))
            groups += found_groups(model, with_siblings(model, layers), self.name)
        return groups + groups_outside(model, modules_outside(model), self.name)

    def config_values(self, group: UnitGroup) -> dict[str, int]:
        """See :meth:`UnitKind.config_values`; most configs derive the size of a head from their number."""
        return {} if group.size is None else super().config_values(group)


def _attention(model: nn.Module, layers: LayerList, number: int, heads: Heads) -> UnitGroup:
    """The heads of one attention."""
    attention = f"{layers.name}.{number}.{heads.module}"
    query, key, value, out = (f"{attention}.{name}" for name in (heads.query, heads.key, heads.value, heads.out))
    holder, _, attribute = f"{attention}.{heads.size}".rpartition(".")
    size = getattr(expected_module(model, holder), attribute)
    if query == key == value:
        units, queries_per_key = output_count(model, query) // (3 * size), 1
        producers = output_slices(model, query, units, size, projections=3)
        values = tuple(replace(piece, offsets=piece.offsets[2:]) for piece in producers)
    else:
        units = output_count(model, key) // size
        queries = output_count(model, query) // size
        queries_per_key = queries // units if units else _queries_per_key(model, heads)
        values = output_slices(model, value, units, size)
        producers = (
            *output_slices(model, query, units, size * queries_per_key),
            *output_slices(model, key, units, size),
            *values,
        )
    if heads.bias is not None and number == 0:
        bias = f"{attention}.{heads.bias}"
        plain_weights(bias, expected_module(model, bias))
        producers += (UnitSlice(f"{bias}.weight", 1, 1),)
    counts = [f"{attention}.{count}".rpartition(".") for count in heads.counts]
    return UnitGroup(
        name=out.removeprefix(base_prefix(model)),
        kind=Head.name,
        layers=((layers.name, number),),
        units=units,
        producers=producers,
        consumers=(input_slice(model, out, units, size * queries_per_key),),
        values=values,
        counts=tuple((module, name) for module, _, name in counts if hasattr(expected_module(model, module), name)),
        minimum=max(heads.minimum, int(layers.stack.first_heads and number == 0)),
        config=heads.config,
        per_unit=(queries_per_key, 1)[: len(heads.config)],
        size=None if heads.config_size is None else (size, heads.config_size),
    )


def _queries_per_key(model: nn.Module, heads: Heads) -> int:
    """How many queries the config gives each key, for a layer that has none left."""
    queries, keys = [getattr(model.config, name, None) for name in (*heads.config, "", "")[:2]]
    return queries // keys if queries and keys else 1
