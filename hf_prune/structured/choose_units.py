"""Choose which heads, neurons and layers go."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.find_unit_groups import LayerList, layer_lists
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.calibration.input_reader import CACHE_BYTES, Batches
from hf_prune.calibration.sensitivity import Sensitivity
from hf_prune.errors import PlanError
from hf_prune.inference.speedup import measured_speedup, workload_inputs
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import refuse_infinite
from hf_prune.planning.targets import module_matches, quick_pattern
from hf_prune.pruning.records import SpeedRecord
from hf_prune.structured.budget import Choice, Costs, allowed_sizes, solve_budget, uniform_sizes
from hf_prune.structured.costs import LINEAR, flops, measured_costs, parameter_costs, variant
from hf_prune.structured.gate_statistics import gate_statistics, layer_losses
from hf_prune.structured.latency_costs import latency_costs
from hf_prune.structured.loss_curves import Curve, additive_curve, fisher_curve
from hf_prune.structured.reconstruction import reconstruction_curves, redundancy_curves
from hf_prune.structured.unit_plan import UnitPlan, unit_batches, unit_groups_of
from hf_prune.utils.distributed import broadcast, fail_together
from hf_prune.utils.offloaded_weights import refuse_offloaded

_TRIES = 6  # to meet a speed-up, each with the budget corrected by what was measured
_CLOSE = 0.02  # share by which a measured speed-up may miss what was asked for


def make_unit_plan(
    model: nn.Module,
    config: PruningConfig,
    calibration: Batches | None = None,
    progress: bool = False,
    cache_bytes: int = CACHE_BYTES,
) -> UnitPlan:
    """:func:`choose_units`, where the plan is all that is wanted."""
    plan, sensitivity = choose_units(model, config, calibration, progress, cache_bytes)
    if sensitivity is not None:
        sensitivity.close()
    return plan


def choose_units(
    model: nn.Module,
    config: PruningConfig,
    calibration: Batches | None = None,
    progress: bool = False,
    cache_bytes: int = CACHE_BYTES,
    scores: Mapping[str, Tensor] | None = None,
) -> tuple[UnitPlan, Sensitivity | None]:
    """Choose which heads, neurons and layers go; the model is not changed.

    Args:
        model: A transformers model of an architecture in the table.
        config: The settings.
        calibration: Batches, for criteria that learn from them; without them the choice is left open.
        progress: Show progress bars.
        cache_bytes: See :func:`hf_prune.prune`.
        scores: What a training has learned of each weight, by parameter name; then no calibration is needed.

    Returns:
        The plan, and how much the predictions depend on what where that was measured; to be closed.

    Raises:
        ArchitectureError: If nobody has said where the units of such a model are.
        PlanError: If the budget cannot be met, a weight is not finite or offloaded, or nothing may go.
        CalibrationError: If the batches are unusable.
    """
    refuse_offloaded(model, "pruning heads, neurons and layers")
    lists = layer_lists(model)
    sites, layers = _candidates(model, config, lists)
    parameters = parameter_costs(model, sites, layers)
    refuse_infinite({p.name: model.get_parameter(p.name).detach() for site in sites for p in site.parts})
    plan = UnitPlan(config, type(model).__name__, tuple(sites), layers, parameters, None, {})
    if (config.learns_units or config.learns_in_training) and calibration is None and scores is None:
        return plan, None
    batches: Batches = []
    sensitivity = None
    if scores is not None:
        curves = _learned_curves(sites, scores)
    else:
        batches = unit_batches(config, calibration) or []
        curves, sensitivity = _curves(model, config, sites, batches, progress, cache_bytes)
    of_layers = _layer_losses(model, config, layers, batches, progress)
    sizes = {site.name: allowed_sizes(site.units, site.minimum, config.round_to) for site in sites}
    losses = {name: curve.losses.flip(0).numpy() for name, curve in curves.items()}

    def solve(costs: Costs, budget: float) -> Choice:
        with fail_together():
            if config.scope == "layer":
                found = Choice(uniform_sizes(costs, budget, sizes), frozenset())
            else:
                found = solve_budget(losses, costs, budget, sizes, layers, of_layers)
        return _agreed(found, list(layers))

    choice, speed = _meet_budget(model, config, plan, lists, solve)
    kept = {name: curves[name].kept(n) for name, n in choice.kept.items() if n < len(curves[name].order)}
    return UnitPlan(config, plan.model_name, plan.sites, layers, parameters, choice, kept, speed), sensitivity


def _agreed(choice: Choice, layers: Sequence[str]) -> Choice:
    """The choice of the first process, in all of them: what each measures differs."""
    own = [*choice.kept.values(), *(name in choice.layers for name in layers)]
    agreed = broadcast(torch.tensor(own, dtype=torch.int64)).tolist()
    gone = agreed[len(choice.kept) :]
    return Choice(
        dict(zip(choice.kept, agreed, strict=False)),
        frozenset(name for name, is_gone in zip(layers, gone, strict=True) if is_gone),
    )


def _candidates(
    model: nn.Module, config: PruningConfig, lists: Sequence[LayerList]
) -> tuple[list[UnitGroup], dict[str, tuple[str, ...]]]:
    """What may go: sites, and whole layers with the sites in them."""
    excluded = quick_pattern(config.exclude_modules)

    def is_excluded(name: str) -> bool:
        return bool(excluded) and module_matches(name, excluded)

    sites = unit_groups_of(model, config)
    alone: dict[str, list[str]] = {}  # sites that are in one layer only, by its name
    for site in sites:
        if len(site.layers) == 1:
            ((stack, number),) = site.layers
            alone.setdefault(f"{stack}.{number}", []).append(site.name)
    layers: dict[str, tuple[str, ...]] = {}
    for each in lists if "layer" in config.granularity else ():
        for i in range(each.stack.fixed, len(each.layers)):
            name = f"{each.name}.{i}"
            if not each.stack.not_below and not is_excluded(name):
                layers[name] = tuple(alone.get(name, ()))
        own = [name for name in layers if name.rpartition(".")[0] == each.name]
        if len(own) == len(each.layers):  # one has to stay
            del layers[own[0]]
    if not sites and not layers:
        raise PlanError(
            f"no {' or '.join(config.granularity)} of {type(model).__name__} may go: check exclude_modules "
            f"({config.exclude_modules!r}), or prune a convolutional model with granularity='channel'"
        )
    return sites, layers


def _curves(
    model: nn.Module,
    config: PruningConfig,
    sites: Sequence[UnitGroup],
    batches: Batches,
    progress: bool,
    cache_bytes: int,
) -> tuple[dict[str, Curve], Sensitivity | None]:
    """For each site the order in which its units go and what that costs, and what was measured on the way."""
    if not sites:
        return {}, None
    if config.criterion == "reconstruction":
        return reconstruction_curves(model, config, sites, batches, progress, cache_bytes)
    if config.criterion in ("fisher", "taylor"):
        statistics = gate_statistics(model, sites, batches, config.seed, progress)
        if config.criterion == "taylor":
            return {name: additive_curve(found.absolute) for name, found in statistics.items()}, None
        if config.repair is None:
            return {name: _rearranged(found.fisher) for name, found in statistics.items()}, None
        diagonals = {
            n: found.fisher.diagonal() if found.fisher.dim() == 2 else found.fisher for n, found in statistics.items()
        }
        return redundancy_curves(model, config, sites, batches, progress, cache_bytes, diagonals)
    parameters = dict(model.named_parameters())
    curves = {}
    for site in sites:
        if config.criterion == "random":
            generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed}:{site.name}".encode()))
            scores = torch.rand(site.units, generator=generator) * site.parameters_per_unit(parameters)
        else:
            squares = [p.by_unit(model.get_parameter(p.name).detach().float(), site.units) for p in site.parts]
            scores = torch.stack([square.square().sum(1) for square in squares]).sum(0)
        curves[site.name] = additive_curve(scores)
    return curves, None


def _learned_curves(sites: Sequence[UnitGroup], scores: Mapping[str, Tensor]) -> dict[str, Curve]:
    """The same from scores of weights. They may be negative, as those of movement, and are lifted alike per weight."""
    totals, sizes = {}, {}
    for site in sites:
        parts = [part.by_unit(scores[part.name], site.units) for part in site.parts if part.name in scores]
        totals[site.name] = torch.stack([part.float().sum(1) for part in parts]).sum(0)
        sizes[site.name] = sum(part.shape[1] for part in parts)
    lowest = min(0.0, *(float(totals[name].min()) / sizes[name] for name in totals))
    return {name: additive_curve(total - lowest * sizes[name]) for name, total in totals.items()}


def _rearranged(fisher: Tensor) -> Curve:
    """Sites compete by the diagonal, and pairs rearrange the units of one site (Kwon et al. 2022)."""
    if fisher.dim() == 1:
        return additive_curve(fisher)
    return dataclasses.replace(additive_curve(fisher.diagonal()), order=fisher_curve(fisher).order)


def _layer_losses(
    model: nn.Module, config: PruningConfig, layers: Mapping[str, Any], batches: Batches, progress: bool
) -> dict[str, float]:
    modules = {name: model.get_submodule(name) for name in layers}
    if not modules:
        return {}
    if config.learns_units:
        return layer_losses(model, modules, batches, progress)
    if config.criterion == "random":
        generator = torch.Generator().manual_seed(config.seed)
        draws = torch.rand(len(modules), generator=generator).tolist()
        sizes = [sum(p.numel() for p in module.parameters()) for module in modules.values()]
        return {name: draw * size for name, draw, size in zip(modules, draws, sizes, strict=True)}
    return {n: sum(float(p.detach().float().square().sum()) for p in m.parameters()) for n, m in modules.items()}


def _meet_budget(
    model: nn.Module,
    config: PruningConfig,
    plan: UnitPlan,
    lists: Sequence[LayerList],
    solve: Callable[[Costs, float], Choice],
) -> tuple[Choice, SpeedRecord | None]:
    costs, layers = plan.parameters, plan.layers
    dense = costs.total({}, (), layers)
    if config.target_speedup is not None:
        return _meet_speedup(model, config, plan, lists, solve)
    if config.target_flops is not None:
        inputs = workload_inputs(model, config.workload)
        costs = measured_costs(model, plan.sites, lists, layers, lambda models: flops(models, inputs), LINEAR)
        return solve(costs, config.target_flops * costs.total({}, (), layers)), None
    if config.target_params is not None:
        return solve(costs, config.target_params * dense), None
    assert config.sparsity is not None
    prunable = dense - costs.base if layers else sum(float(c[-1]) for c in costs.sites.values())
    return solve(costs, dense - config.sparsity * prunable), None


def _meet_speedup(
    model: nn.Module,
    config: PruningConfig,
    plan: UnitPlan,
    lists: Sequence[LayerList],
    solve: Callable[[Costs, float], Choice],
) -> tuple[Choice, SpeedRecord]:
    """Sizes whose measured speed-up is what was asked for: the budget is corrected until it is."""
    assert config.target_speedup is not None
    inputs = workload_inputs(model, config.workload)
    costs = latency_costs(model, plan.sites, lists, plan.layers, inputs)
    dense = costs.total({}, (), plan.layers)
    budget = dense / config.target_speedup
    best: tuple[float, Choice, SpeedRecord] | None = None
    slow, fast = None, None  # (logarithm of a budget, of how far off it was), on either side of what was asked for
    for _ in range(_TRIES):
        choice = solve(costs, budget)
        without = {site for layer in choice.layers for site in plan.layers[layer]}
        twin = variant(model, {n: k for n, k in choice.kept.items() if n not in without}, [*choice.layers])
        record = measured_speedup(model, twin, inputs, config.workload)
        predicted = dense / costs.total(choice.kept, choice.layers, plan.layers)
        record = record.with_prediction(config.target_speedup, predicted)
        agreed = broadcast(torch.tensor([record.measured, record.low, record.high, record.predicted])).tolist()
        record = dataclasses.replace(record, **dict(zip(("measured", "low", "high", "predicted"), agreed, strict=True)))
        miss = abs(record.measured / config.target_speedup - 1)
        if best is None or miss < best[0]:
            best = (miss, choice, record)
        if miss <= _CLOSE:
            break
        off = math.log(record.measured / config.target_speedup)
        slow, fast = ((math.log(budget), off), fast) if off < 0 else (slow, (math.log(budget), off))
        if slow is not None and fast is not None:
            part = min(0.9, max(0.1, -slow[1] / (fast[1] - slow[1])))
            budget = math.exp(slow[0] + part * (fast[0] - slow[0]))
        else:
            budget *= record.measured / config.target_speedup
    assert best is not None
    return best[1], best[2]
