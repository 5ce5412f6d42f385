"""Units that discovery found, as slices of the parameters of one layer; their sizes are read off its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from hf_prune.architectures.base import Piece, Units
from hf_prune.architectures.layer_list import LayerList, inside
from hf_prune.architectures.modules import attribute_value, base_prefix, find_tensor
from hf_prune.architectures.unit_groups import FOUND, UnitGroup, UnitSlice
from hf_prune.errors import ArchitectureError


def found_groups(model: nn.Module, layers: LayerList, kind: str) -> list[UnitGroup]:
    """The groups of units of one kind that discovery found in a stack, layer by layer.

    Raises:
        ArchitectureError: If the sizes of a layer do not fit what was found.
    """
    groups: list[UnitGroup] = []
    units_of_kind = [units for units in layers.stack.units if units.kind == kind]
    together: dict[Units, list[UnitGroup]] = {units: [] for units in units_of_kind if units.shared}
    for number, layer in enumerate(layers.layer_names()):
        place = () if layers.names else ((layers.name, number),)
        of_layer = [(u, g) for u in units_of_kind if (g := found_group(model, layer, u, place)) is not None]
        for units, group in of_layer:
            if _is_largest(group, [other for _, other in of_layer]):
                together.get(units, groups).append(group)
    return groups + [joined_groups(bundle) for bundle in together.values() if bundle]


def groups_outside(model: nn.Module, modules: Sequence[LayerList], kind: str) -> list[UnitGroup]:
    """The groups of units of one kind in modules that stand in no list, as far as their sizes fit what was found."""
    groups: list[UnitGroup] = []
    for holders in modules:
        with contextlib.suppress(ArchitectureError):  # a module of the same name, and of another kind
            groups += found_groups(model, holders, kind)
    return groups


def _is_largest(group: UnitGroup, others: Iterable[UnitGroup]) -> bool:
    """Whether no other group of the layer has the same consumer and more slices (a bias that only some layers have)."""
    return all(len(other.slices) <= len(group.slices) for other in others if other.name == group.name)


def joined_groups(groups: Sequence[UnitGroup]) -> UnitGroup:
    """One group of the units that several layers must keep or lose together.

    Raises:
        ArchitectureError: If they differ in number.
    """
    if len({group.units for group in groups}) > 1:
        raise ArchitectureError(
            f"the layers of {groups[0].name} share their position biases and have {[g.units for g in groups]} heads: "
            f"expected the same number everywhere"
        )
    return replace(
        groups[0],
        layers=tuple(dict.fromkeys(place for group in groups for place in group.layers)),
        producers=tuple(dict.fromkeys(piece for group in groups for piece in group.producers)),
        consumers=tuple(dict.fromkeys(piece for group in groups for piece in group.consumers)),
        values=tuple(dict.fromkeys(piece for group in groups for piece in group.values)),
        counts=tuple(dict.fromkeys(count for group in groups for count in group.counts)),
        buffers=tuple(dict.fromkeys(piece for group in groups for piece in group.buffers)),
        minimum=1,
    )


def found_group(model: nn.Module, layer: str, units: Units, place: tuple[tuple[str, int], ...]) -> UnitGroup | None:
    """The units of one layer; None if the layer does not have such units.

    Args:
        model: The model.
        layer: The name of the layer.
        units: What was found in layers of the list.
        place: The list of layers and the number in it; empty outside of lists.

    Raises:
        ArchitectureError: If the sizes of the layer do not fit what was found.
    """
    prefix = base_prefix(model)
    pieces = units.producers + units.consumers + units.buffers
    names = {piece: prefix + piece.name if piece.outside else inside(layer, piece.name) for piece in pieces}
    tensors = {piece: find_tensor(model, name) for piece, name in names.items()}
    totals = {piece: tensor.shape[piece.dim] for piece, tensor in tensors.items() if tensor is not None}
    size = None if units.size is None else find_attribute(model, inside(layer, units.size))
    if len(totals) < len(pieces) or (units.size is not None and not size):
        return None
    wide_total = totals[units.consumers[0]] // len(units.consumers[0].wide)
    if units.number is not None:
        count = find_attribute(model, inside(layer, units.number))
    elif size:
        sized = next(piece for piece in pieces if piece.name == units.sized)
        count = totals[sized] // (len(sized.wide) * size)
    else:
        count = wide_total
    if not count or wide_total % count:
        raise _misfit(names[units.consumers[0]], wide_total, count or 0)
    wide = wide_total // count
    slices = {piece: _slices(names[piece], piece, totals[piece], count, wide) for piece in pieces}
    values = {name: find_attribute(model, inside(layer, name)) for name in units.counts}
    if None in values.values():
        return None
    for name, value in values.items():
        if value is None or value % count:
            raise _misfit(inside(layer, name), value or 0, count)
    per_size = wide // size if size else 1
    return UnitGroup(
        name=names[units.consumers[0]].rpartition(".")[0].removeprefix(prefix),
        kind=units.kind,
        units=count,
        producers=tuple(s for piece in units.producers for s in slices[piece]),
        consumers=tuple(s for piece in units.consumers for s in slices[piece]),
        layers=place,
        values=tuple(s for piece in units.producers if piece.name in units.values for s in slices[piece]),
        counts=tuple(_split_attribute(inside(layer, name)) for name in units.counts),
        minimum=1,
        config=units.config,
        per_unit=tuple(per_size if narrow else 1 for narrow in units.narrow),
        size=(size, units.config_size) if size and units.config_size else None,
        buffers=tuple(s for piece in units.buffers for s in slices[piece]),
        origin=FOUND,
    )


def find_attribute(model: nn.Module, name: str) -> int | None:
    """The whole number that an attribute of a module (or an entry of it) or of its config holds; None without one."""
    holder, attribute = _split_attribute(name)
    try:
        value: Any = model.get_submodule(holder)
    except AttributeError:
        return None
    for key in attribute.split("."):
        try:
            value = attribute_value(value, key)
        except RuntimeError:  # transformers refuses what a config gives layer by layer
            return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _split_attribute(name: str) -> tuple[str, str]:
    """The module and the attribute in a name such as ``"h.0.attn.num_heads"`` or ``"h.0.attn.config.num_heads"``."""
    holder, _, attribute = name.rpartition(".")
    return (
        (holder.removesuffix(".config"), f"config.{attribute}") if holder.endswith(".config") else (holder, attribute)
    )


def _slices(name: str, piece: Piece, total: int, units: int, wide: int) -> tuple[UnitSlice, ...]:
    """Where the units lie in one parameter; two slices if its parts have two widths."""
    parts = len(piece.wide)
    if piece.fixed is not None:
        fixed, begin = total - parts * units * wide, piece.fixed * units * wide
        if fixed <= 0:
            raise _misfit(name, total, units)
        starts = tuple(part * units * wide + (fixed if part >= piece.fixed else 0) for part in range(parts))
        return (UnitSlice(name, piece.dim, wide, starts, fixed=(begin, fixed)),)
    if len(set(piece.wide)) == 1:
        if total % (units * parts):
            raise _misfit(name, total, units)
        return (UnitSlice(name, piece.dim, total // (units * parts), tuple(range(0, total, total // parts))),)
    number_wide = sum(piece.wide)
    narrow, rest = divmod(total - number_wide * wide * units, units * (parts - number_wide))
    if rest or narrow <= 0:
        raise _misfit(name, total, units)
    offsets: dict[int, list[int]] = {wide: [], narrow: []}
    start = 0
    for is_wide in piece.wide:
        width = wide if is_wide else narrow
        offsets[width].append(start)
        start += width * units
    return tuple(UnitSlice(name, piece.dim, width, tuple(starts)) for width, starts in offsets.items())


def _misfit(name: str, total: int, units: int) -> ArchitectureError:
    return ArchitectureError(
        f"{name} has the size {total} for {units} units: expected a multiple, as in a small model of the same config; "
        f"say where the units are with hf_prune.register_architecture under another config.model_type"
    )
