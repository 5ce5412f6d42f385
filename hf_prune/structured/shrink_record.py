"""What a shrunk model's config says of its sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from hf_prune.architectures.find_unit_groups import LayerList, base_prefix, find_unit_groups
from hf_prune.architectures.unit_groups import UnitGroup

RECORD = "pruned_structure"  # the attribute of the config that says what was done


def layer_of(name: str, layers: Collection[str]) -> str | None:
    """The one of some layers that a module or parameter is in."""
    return next((name[:end] for end, sign in enumerate(name) if sign == "." and name[:end] in layers), None)


def new_name(name: str, renamed: Mapping[str, str]) -> str:
    """What a parameter is called after layers before it were taken out."""
    old = layer_of(name, renamed)
    return name if old is None else renamed[old] + name.removeprefix(old)


def record_structure(
    model: nn.Module,
    before: int,
    units: Mapping[str, int],
    kept: Mapping[str, Tensor],
    lists: list[LayerList],
    gone: set[str],
    renamed: Mapping[str, str],
) -> None:
    """Write into the config what was taken out; what earlier calls wrote stays, under the names of now."""
    if not kept and not gone:
        return
    prefix = base_prefix(model)
    old = getattr(model.config, RECORD, None) or {"format_version": 1, "parameters_before": before}
    without = {name.removeprefix(prefix) for name in gone}
    short = {a.removeprefix(prefix): b.removeprefix(prefix) for a, b in renamed.items()}
    known = {new_name(n, short): dict(u) for n, u in old.get("units", {}).items() if layer_of(n, without) is None}
    for name, index in kept.items():
        entry = known.setdefault(new_name(name, short), {"before": units[name]})
        entry["kept"] = len(index)
    layers: dict[str, Any] = {name: dict(entry) for name, entry in old.get("layers", {}).items()}
    for each in lists:
        stay = [i for i in range(len(each.layers)) if f"{each.name}.{i}" not in gone]
        if len(stay) < len(each.layers):
            entry = layers.setdefault(
                each.name.removeprefix(prefix), {"before": len(each.layers), "kept": list(range(len(each.layers)))}
            )
            entry["kept"] = [entry["kept"][i] for i in stay]
    setattr(model.config, RECORD, {**old, "units": known, "layers": layers})


def simplify_config(model: nn.Module) -> None:
    """Have the config tell the sizes of heads and neurons wherever it can: where all that it speaks of are alike."""
    by_config: dict[tuple[str, ...], list[UnitGroup]] = {}
    for site in find_unit_groups(model):
        if site.config:
            by_config.setdefault(site.config, []).append(site)
    for names, sites in by_config.items():
        alike = len({(s.units, s.per_unit, s.size) for s in sites}) == 1
        first = sites[0]
        if not alike or not first.units:
            continue
        if first.kind == "head" and first.size is None:
            continue
        for name, each in zip(names, first.per_unit, strict=True):
            setattr(model.config, name, first.units * each)
        if first.size is not None:
            setattr(model.config, first.size[1], first.size[0])


def is_shrunk(model: nn.Module) -> bool:
    """Whether something was taken out of a model, or of one inside it."""
    return any(getattr(getattr(module, "config", None), RECORD, None) is not None for module in model.modules())
