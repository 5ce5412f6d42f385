"""What a model of other sizes costs, in parameters, operations or seconds: counted or measured, never guessed.

Operations and seconds are those of whole forward passes of the model itself with fewer heads or neurons in all layers
of a stack, or fewer layers. Such a variant shares the weights of the model but for the slices that it has fewer of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_prune.architectures.find_unit_groups import LayerList
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.errors import PlanError
from hf_prune.pruning.bypass import bypass
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.structured.budget import Costs
from hf_prune.structured.shrink import resize, take_out_layers

FINE = {"head": (0.0, 0.25, 0.5, 0.75), "neuron": (0.0, 0.0625, 0.125, 0.25, 0.5, 0.75)}
COARSE = {"head": (0.0, 0.5), "neuron": (0.0, 0.125, 0.5)}  # where a forward pass takes long
LINEAR = {"head": (0.0,), "neuron": (0.0,)}  # where the cost grows evenly with every unit

Measure = Callable[[Mapping[str, nn.Module]], Mapping[str, float]]


def parameter_costs(model: nn.Module, sites: Sequence[UnitGroup], layers: Mapping[str, Sequence[str]]) -> Costs:
    """The number of parameters as a function of the sizes.

    Args:
        model: The model.
        sites: Those that may lose units.
        layers: The sites in each layer that may go as a whole, by its name.
    """
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    each = {site.name: site.parameters_per_unit(parameters) if site.units else 0 for site in sites}
    of_sites = {site.name: np.arange(site.units + 1, dtype=np.float64) * each[site.name] for site in sites}
    rest = {
        name: sum(p.numel() for p in model.get_submodule(name).parameters()) - sum(of_sites[s][-1] for s in inside)
        for name, inside in layers.items()
    }
    total = sum(p.numel() for p in model.parameters())
    return Costs(total - sum(c[-1] for c in of_sites.values()) - sum(rest.values()), of_sites, rest)


def measured_costs(
    model: nn.Module,
    sites: Sequence[UnitGroup],
    lists: Sequence[LayerList],
    layers: Mapping[str, Sequence[str]],
    measure: Measure,
    shares: Mapping[str, Sequence[float]] = FINE,
) -> Costs:
    """Any cost of whole models as a function of the sizes of their sites.

    Between the sizes that were measured a cost is interpolated, and it never falls with the size: where a larger size
    was measured to cost less, both get the larger cost.

    Args:
        model: The model.
        sites: Those that may lose units.
        lists: The stacks of layers of the model.
        layers: The sites in each layer that may go as a whole, by its name.
        measure: Gives the cost of each of some models.
        shares: At which shares of their units sites of each kind are measured, besides all of them.
    """
    groups: dict[tuple[str, str], list[UnitGroup]] = {}
    for site in sites:
        if site.units:
            groups.setdefault((site.layers[0][0], site.kind), []).append(site)
    variants: dict[str, nn.Module] = {"all": model}
    points: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for group, members in groups.items():
        for share in shares[group[1]]:
            kept = {site.name: max(site.minimum, round(share * site.units)) for site in members}
            name = f"{group[0]} {group[1]} {share}"
            variants[name] = variant(model, kept)
            real = float(np.mean([kept[site.name] / site.units for site in members]))
            points.setdefault(group, []).append((real, name))
    short: dict[str, list[str]] = {}
    for each in lists:
        removable = [name for name in layers if name.rpartition(".")[0] == each.name]
        if gone := removable[: len(each.layers) - 1]:
            short[f"{each.name} short"] = gone
            variants[f"{each.name} short"] = variant(model, {}, gone)
    found = measure(variants)
    of_sites: dict[str, np.ndarray] = {site.name: np.zeros(site.units + 1) for site in sites}
    for group, members in groups.items():
        x, y = zip(*[(share, found[name]) for share, name in points[group]], (1.0, found["all"]), strict=True)
        y = np.maximum.accumulate(np.array(y)) - min(y)  # what the group costs at all
        for site in members:
            of_sites[site.name] = np.interp(np.arange(site.units + 1) / site.units, x, y / len(members))
    rest = dict.fromkeys(layers, 0.0)
    for name, gone in short.items():
        saved = (found["all"] - found[name]) / len(gone)  # by each
        for layer in layers:
            if layer.rpartition(".")[0] == gone[0].rpartition(".")[0]:
                rest[layer] = max(0.0, saved - sum(float(of_sites[s][-1]) for s in layers[layer]))
    base = found["all"] - sum(float(c[-1]) for c in of_sites.values()) - sum(rest.values())
    return Costs(base, of_sites, rest)


def variant(model: nn.Module, kept: Mapping[str, int], gone: Sequence[str] = ()) -> nn.Module:
    """A model that computes as much as the model would with other sizes; what it puts out is of no use.

    Args:
        model: The model, which is not changed; the variant uses its weights.
        kept: Units by site.
        gone: Names of layers that it lacks.
    """
    store = MaskStore.of(model) or MaskStore()
    masks = (*store.masks.values(), *(store.dense or {}).values())
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers(), *masks)}
    twin = copy.deepcopy(model, memo)
    for name in gone:
        bypass(twin.get_submodule(name))
    resize(twin, kept)
    take_out_layers(twin)
    return twin.eval()


def flops(models: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> dict[str, float]:
    """Operations of one forward pass, counted by PyTorch: two for each multiplication and addition of a matrix product.

    Args:
        models: Models by name.
        inputs: Keyword arguments of a forward pass.

    Raises:
        PlanError: If the model computes nothing that is counted.
    """
    from torch.utils.flop_counter import FlopCounterMode

    found = {}
    for name, model in models.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs)
        found[name] = float(counter.get_total_flops())
    if not all(found.values()):
        raise PlanError("no operations were counted in a forward pass: target_flops needs a model of matrix products")
    return found
