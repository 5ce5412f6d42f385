"""Find the units in one model that can be removed as a whole, read off its weights."""

from __future__ import annotations

from torch import nn

from hf_prune.architectures.kinds.registry import all_kinds
from hf_prune.architectures.layers import layer_lists
from hf_prune.architectures.unit_groups import UnitGroup, overlapping_kinds
from hf_prune.errors import ArchitectureError


def find_unit_groups(model: nn.Module) -> list[UnitGroup]:
    """The groups of units that ``shrink()`` can cut, layer by layer, attention first; then block by block.

    Kinds that only regroup units of another kind are left out.

    Raises:
        ArchitectureError: If the architecture is not registered, its modules are not where the table says, their sizes
            do not fit, or two kinds would cut the same slices.
    """
    layer_lists(model)  # refuses models whose weights cannot be cut
    kinds = [kind for kind in all_kinds() if kind.cut_as is None]
    groups = in_model_order(model, [group for kind in kinds for group in kind.groups(model)])
    if (pair := overlapping_kinds(groups)) is not None:
        raise ArchitectureError(
            f"the kinds of units {pair[0].kind!r} and {pair[1].kind!r} both cut {pair[1].name}: expected kinds that "
            f"share no parameter; a kind that regroups units of another one names it in cut_as"
        )
    return groups


def in_model_order(model: nn.Module, groups: list[UnitGroup]) -> list[UnitGroup]:
    """Groups of several kinds, layer by layer; in one layer, and outside of layers, they stay in order."""
    places = [(layers.name, number) for layers in layer_lists(model) for number in range(len(layers.layers))]
    order = {place: index for index, place in enumerate(places)}
    return sorted(groups, key=lambda group: order.get(group.layers[0], len(order)) if group.layers else len(order))
