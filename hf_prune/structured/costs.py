"""What a model of other sizes costs, in parameters, operations or seconds: counted or measured, never guessed.

Operations and seconds are measured in whole forward passes of variants of the model: with fewer heads or neurons in all
layers of a stack, or with fewer layers. A variant shares all weights with the model except those that were cut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from hf_prune.architectures.bypass import bypass
from hf_prune.architectures.cut_units import cut_units
from hf_prune.architectures.kinds.registry import kind_named
from hf_prune.architectures.layer_list import LayerList
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.errors import PlanError
from hf_prune.inference.passes import workload_passes
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.structured.budget import Costs
from hf_prune.structured.shrink import remove_bypassed_layers
from hf_prune.structured.shrink_record import holding_layers

#: At how many sizes a cost is measured: those that a kind of unit names for "fine" or "coarse", or, for costs that are
#: linear in the number of units, only without any.
Resolution = Literal["fine", "coarse", "linear"]
Measure = Callable[[Mapping[str, nn.Module]], Mapping[str, float]]


def parameter_costs(model: nn.Module, groups: Sequence[UnitGroup], layers: Mapping[str, Sequence[str]]) -> Costs:
    """The number of parameters as a function of the sizes.

    Args:
        model: The model.
        groups: The groups that may lose units.
        layers: The layers that may be removed as a whole, each with the names of the groups in it.
    """
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    by_group = {
        group.name: np.arange(group.units + 1, dtype=np.float64)
        * (group.parameters_per_unit(parameters) if group.units else 0)
        for group in groups
    }
    inside = {inner.name: outer.name for outer in groups for inner in groups if _holds(outer, inner)}
    for inner, outer in inside.items():  # the experts cost what their neurons do not
        experts = by_group[outer]
        by_group[outer] = experts - np.arange(len(experts)) * by_group[inner][-1] / max(1, len(experts) - 1)
    by_layer = {name: -float(sum(by_group[g][-1] for g in inside)) for name, inside in layers.items()}
    for name, holding in holding_layers(model, layers).items():
        if len(holding) == 1 and (layer := next(iter(holding))) is not None:  # what layers share stays with the others
            by_layer[layer] += parameters[name].numel()
    total = sum(p.numel() for p in model.parameters())
    return Costs(total - sum(c[-1] for c in by_group.values()) - sum(by_layer.values()), by_group, by_layer, inside)


def _holds(outer: UnitGroup, inner: UnitGroup) -> bool:
    """Whether the units of one group, such as experts, are slabs of the tensors of the other, or modules with them."""
    if outer is inner or outer.kind == inner.kind:
        return False
    names = {piece.name for piece in inner.slices}
    slabs = {piece.name for piece in outer.slices if piece.dim == 0}
    lists = tuple(f"{name}." for name in outer.lists)
    return (bool(inner.choices) and names <= slabs) or all(name.startswith(lists) for name in names)


def measured_costs(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    lists: Sequence[LayerList],
    layers: Mapping[str, Sequence[str]],
    measure: Measure,
    resolution: Resolution = "fine",
) -> Costs:
    """Any cost of whole models as a function of the sizes of their groups.

    Groups of the same kind in the same stack are resized together, and each is charged the same part of what that
    saves. Between measured sizes the cost is interpolated. It never falls with the size: if a larger size was measured
    to cost less, both get the larger cost.

    Args:
        model: The model.
        groups: The groups that may lose units.
        lists: The stacks of layers of the model.
        layers: The layers that may be removed as a whole, each with the names of the groups in it.
        measure: Gives the cost of each of several models, by name.
        resolution: At how many sizes to measure.
    """
    together: dict[tuple[str, str], list[UnitGroup]] = {}
    for group in groups:
        if group.units:
            stack = group.layers[0][0] if group.layers else group.name
            together.setdefault((stack, group.kind), []).append(group)
    variants: dict[str, nn.Module] = {"all": model}
    points: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for key, members in together.items():
        for share in _shares(key[1], resolution):
            kept = {group.name: max(group.minimum, round(share * group.units)) for group in members}
            name = f"{key[0]} {key[1]} {share}"
            variants[name] = variant(model, members, kept)
            actual_share = float(np.mean([kept[group.name] / group.units for group in members]))
            points.setdefault(key, []).append((actual_share, name))
    without_layers: dict[str, list[str]] = {}
    for layer_list in lists:
        removable = [name for name in layers if name.rpartition(".")[0] == layer_list.name]
        if removed := removable[: len(layer_list.layers) - 1]:
            without_layers[f"{layer_list.name} short"] = removed
            variants[f"{layer_list.name} short"] = variant(model, (), {}, removed)
    costs = measure(variants)
    by_group: dict[str, np.ndarray] = {group.name: np.zeros(group.units + 1) for group in groups}
    for key, members in together.items():
        x, y = zip(*[(share, costs[name]) for share, name in points[key]], (1.0, costs["all"]), strict=True)
        y = np.maximum.accumulate(np.array(y)) - min(y)  # what these groups cost beyond their smallest size
        for group in members:
            by_group[group.name] = np.interp(np.arange(group.units + 1) / group.units, x, y / len(members))
    by_layer = dict.fromkeys(layers, 0.0)
    for name, removed in without_layers.items():
        saved_by_each = (costs["all"] - costs[name]) / len(removed)
        for layer in layers:
            if layer.rpartition(".")[0] == removed[0].rpartition(".")[0]:
                by_layer[layer] = max(0.0, saved_by_each - sum(float(by_group[g][-1]) for g in layers[layer]))
    base = costs["all"] - sum(float(c[-1]) for c in by_group.values()) - sum(by_layer.values())
    return Costs(base, by_group, by_layer)


def _shares(kind: str, resolution: Resolution) -> Sequence[float]:
    """The shares of units at which a kind is measured, besides all of them."""
    if resolution == "linear":
        return (0.0,)
    return kind_named(kind).fine_shares if resolution == "fine" else kind_named(kind).coarse_shares


def variant(
    model: nn.Module, groups: Sequence[UnitGroup], kept: Mapping[str, int], removed_layers: Sequence[str] = ()
) -> nn.Module:
    """A model that does the same amount of work as the model would with other sizes. Its outputs are of no use.

    Args:
        model: The model, which is not changed; the variant uses its weights.
        groups: Groups of the model.
        kept: How many units to keep, by group; groups that are not named keep all.
        removed_layers: Names of layers to leave out.
    """
    store = MaskStore.of(model) or MaskStore()
    masks = (*(mask.bits for mask in store.masks.packed.values()), *(store.dense or {}).values())
    # Everything in the memo is shared instead of copied.
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers(), *masks)}
    twin = copy.deepcopy(model, memo)
    for name in removed_layers:
        bypass(twin.get_submodule(name))
    cut_units(twin, groups, {name: torch.arange(number) for name, number in kept.items()})
    remove_bypassed_layers(twin)
    return twin.eval()


def flops(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Any], workload: Mapping[str, int] = {}
) -> dict[str, float]:
    """Operations of a workload, counted by PyTorch: a multiplication and an addition count as two.

    Args:
        models: Models by name, in eval mode.
        inputs: Keyword arguments of a forward pass, or the prompt.
        workload: What is run, see :func:`~hf_prune.inference.passes.workload_passes`; one forward pass by default.

    Raises:
        PlanError: If the model computes nothing that is counted.
    """
    from torch.utils.flop_counter import FlopCounterMode

    operations = {}
    for name, model in models.items():
        operations[name] = 0.0
        for one in workload_passes(model, inputs, workload).values():
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                one.run()
            operations[name] += float(one.times * counter.get_total_flops())
    if not all(operations.values()):
        raise PlanError("no operations were counted in a forward pass: target_flops needs a model of matrix products")
    return operations
