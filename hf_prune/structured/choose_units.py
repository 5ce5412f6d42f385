"""Choose which heads, neurons and layers are removed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.discovery.find import discover
from hf_prune.architectures.entries import is_in_table
from hf_prune.architectures.kinds.registry import kind_named
from hf_prune.architectures.layer_list import LayerList
from hf_prune.architectures.layers import layer_lists
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.calibration.batches import Batches
from hf_prune.calibration.input_reader import CACHE_BYTES
from hf_prune.calibration.sensitivity import Sensitivity
from hf_prune.errors import PlanError
from hf_prune.inference.speedup import measured_speedup, workload_inputs
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import refuse_infinite
from hf_prune.planning.parts import is_chosen
from hf_prune.planning.targets import module_matches, quick_pattern
from hf_prune.pruning.records import SpeedRecord
from hf_prune.structured.budget import Choice, Costs, allowed_sizes, solve_budget, uniform_sizes
from hf_prune.structured.costs import flops, measured_costs, parameter_costs, variant
from hf_prune.structured.gate_statistics import gate_statistics, layer_losses
from hf_prune.structured.latency_costs import latency_costs
from hf_prune.structured.loss_curves import Curve, additive_curve, fisher_curve
from hf_prune.structured.reconstruction import reconstruction_curves, redundancy_curves
from hf_prune.structured.routing import observe_routing
from hf_prune.structured.unit_plan import UnitPlan, unit_groups_of
from hf_prune.structured.unit_scores import (
    curve_of_scores,
    learned_curves,
    random_scores,
    squared_weights,
    sum_of_squares,
)
from hf_prune.utils.distributed import broadcast, fail_together
from hf_prune.utils.offloaded_weights import refuse_offloaded

_MAX_ATTEMPTS = 6  # at meeting a speed-up; each corrects the budget by what was measured
_TOLERANCE = 0.02  # by which a measured speed-up may miss the target, as a share of it


def choose_units(
    model: nn.Module,
    config: PruningConfig,
    calibration: Batches | None = None,
    progress: bool = False,
    cache_bytes: int = CACHE_BYTES,
    scores: Mapping[str, Tensor] | None = None,
) -> tuple[UnitPlan, Sensitivity | None]:
    """Choose which heads, neurons and layers are removed. The model is not changed.

    Args:
        model: A transformers model of an architecture in the table.
        config: The settings.
        calibration: Batches for criteria that learn from them; without them the choice is left open.
        progress: Show progress bars.
        cache_bytes: How much of each of the recorded outputs and sensitivities is kept in memory.
        scores: Scores of each weight that a training has learned, by parameter name; they replace calibration.

    Returns:
        The plan, and the sensitivity of the predictions if it was measured; close it after use.

    Raises:
        ArchitectureError: If nobody has said where the units of such a model are.
        PlanError: If the budget cannot be met, a weight is not finite or offloaded, or nothing may be removed.
        CalibrationError: If the batches are unusable.
    """
    refuse_offloaded(model, "pruning heads, neurons and layers")
    lists = layer_lists(model)
    groups, layers = _candidates(model, config)
    parameters = parameter_costs(model, groups, layers)
    _check_packed(config, groups, parameters)
    refuse_infinite({p.name: model.get_parameter(p.name).detach() for group in groups for p in group.slices})
    plan = UnitPlan(config, type(model).__name__, tuple(groups), layers, parameters, None, {})
    if (config.learns_units or config.learns_in_training) and calibration is None and scores is None:
        return plan, None
    batches: Batches = []
    sensitivity = None
    if scores is not None:
        curves = learned_curves(groups, scores)
    else:
        batches = calibration or []
        curves, sensitivity = _curves(model, config, groups, batches, progress, cache_bytes)
    layer_costs = _layer_losses(model, config, layers, batches, progress)
    sizes = {g.name: allowed_sizes(g.units, g.minimum, math.lcm(config.round_to, g.runs, g.step)) for g in groups}
    losses = {name: curve.losses.flip(0).numpy() for name, curve in curves.items()}

    def solve(costs: Costs, budget: float) -> Choice:
        with fail_together():
            if config.scope == "layer":
                choice = Choice(uniform_sizes(costs, budget, sizes), frozenset())
            else:
                choice = solve_budget(losses, costs, budget, sizes, layers, layer_costs)
        return _synchronized(choice, list(layers))

    choice, speed = _meet_budget(model, config, plan, lists, solve)
    kept = {name: curves[name].kept(n) for name, n in choice.kept.items() if n < curves[name].order.shape[-1]}
    return UnitPlan(config, plan.model_name, plan.sites, layers, parameters, choice, kept, speed), sensitivity


def _check_packed(config: PruningConfig, groups: Sequence[UnitGroup], costs: Costs) -> None:
    """Refuse settings that need to see the neurons of packed experts, or to weigh them against whole experts."""
    if costs.inside and config.scope == "global":
        raise PlanError(
            "experts and the neurons inside them share weights, so one cannot be weighed against the other: use "
            "scope='layer', which removes the same share of both, or prune them one after the other"
        )
    packed = next((group for group in groups if group.choices), None)
    if packed is not None and config.criterion not in ("magnitude", "random"):
        raise PlanError(
            f"criterion {config.criterion!r} cannot watch the neurons of {packed.name}, whose experts share a tensor: "
            f"choose magnitude or random, or spare the experts with exclude_modules={[packed.name]!r}"
        )
    if packed is not None and config.repair is not None:
        raise PlanError(
            f"repair={config.repair!r} cannot repair {packed.name}, whose experts share a tensor: leave repair out, "
            f"or spare the experts with exclude_modules={[packed.name]!r}"
        )


def _synchronized(choice: Choice, layers: Sequence[str]) -> Choice:
    """The choice of the first process, in all of them: each may have measured something else."""
    flat = [*choice.kept.values(), *(name in choice.layers for name in layers)]
    agreed = broadcast(torch.tensor(flat, dtype=torch.int64)).tolist()
    kept, removed = agreed[: len(choice.kept)], agreed[len(choice.kept) :]
    return Choice(
        dict(zip(choice.kept, kept, strict=True)),
        frozenset(name for name, is_removed in zip(layers, removed, strict=True) if is_removed),
    )


def _candidates(model: nn.Module, config: PruningConfig) -> tuple[list[UnitGroup], dict[str, tuple[str, ...]]]:
    """What may be removed: units of groups, and whole layers, each with the names of the groups in it."""
    excluded, in_part = quick_pattern(config.exclude_modules), is_chosen(model, config)

    def is_excluded(name: str) -> bool:
        return (bool(excluded) and module_matches(name, excluded)) or not in_part(name)

    groups = unit_groups_of(model, config)
    in_one_layer: dict[str, list[str]] = {}
    for group in groups:
        if len(group.layers) == 1:
            ((stack, number),) = group.layers
            in_one_layer.setdefault(f"{stack}.{number}", []).append(group.name)
    names = [name for kind in config.granularity for name in kind_named(kind).removable_layers(model, is_excluded)]
    layers = {name: tuple(in_one_layer.get(name, ())) for name in names}
    if not groups and not layers:
        raise PlanError(
            f"no {' or '.join(config.granularity)} of {type(model).__name__} may go: {_why_none(model, config)}"
        )
    return groups, layers


def _why_none(model: nn.Module, config: PruningConfig) -> str:
    """Why nothing of a model may be removed."""
    if config.only is not None:
        return f"check only ({config.only!r})"
    if config.exclude_modules:
        return f"check exclude_modules ({config.exclude_modules!r})"
    reasons = [reason for kind in config.granularity for reason in kind_named(kind).obstacles(model)]
    if not reasons and not is_in_table(model):
        reasons = [f"{name}: {reason}" for name, reason in discover(model).refused.items()]
    return "; ".join(reasons[:2]) or (
        "none was found that can go by itself, as heads cannot that share one key; describe_units(model) lists what "
        "can, and granularity='channel' prunes convolutions"
    )


def _curves(
    model: nn.Module,
    config: PruningConfig,
    groups: Sequence[UnitGroup],
    batches: Batches,
    progress: bool,
    cache_bytes: int,
) -> tuple[dict[str, Curve], Sensitivity | None]:
    """The removal order and losses of each group, and the sensitivity if it was measured on the way."""
    if not groups:
        return {}, None
    if config.criterion == "reconstruction":
        return reconstruction_curves(model, config, groups, batches, progress, cache_bytes)
    if config.criterion in ("fisher", "taylor"):
        statistics = gate_statistics(model, groups, batches, config.seed, progress)
        if config.criterion == "taylor":
            return {name: additive_curve(gates.absolute) for name, gates in statistics.items()}, None
        if config.repair is None:
            return {name: _rearranged(gates.fisher) for name, gates in statistics.items()}, None
        diagonals = {
            name: gates.fisher.diagonal() if gates.fisher.dim() == 2 else gates.fisher
            for name, gates in statistics.items()
        }
        return redundancy_curves(model, config, groups, batches, progress, cache_bytes, diagonals)
    if config.criterion in ("reap", "frequency"):
        routing = observe_routing(model, groups, batches, progress)
        values = {name: seen.reap if config.criterion == "reap" else seen.frequency for name, seen in routing.items()}
        return {group.name: curve_of_scores(model, group, values[group.name]) for group in groups}, None
    if config.criterion == "random":
        return {g.name: curve_of_scores(model, g, random_scores(model, g, config.seed)) for g in groups}, None
    if config.criterion == "magnitude":
        return {group.name: curve_of_scores(model, group, squared_weights(model, group)) for group in groups}, None
    raise PlanError(f"criterion {config.criterion!r} is registered for units, but choose_units has no curves for it")


def _rearranged(fisher: Tensor) -> Curve:
    """Groups compete by the diagonal; pairs only rearrange the units within a group (Kwon et al. 2022)."""
    if fisher.dim() == 1:
        return additive_curve(fisher)
    return dataclasses.replace(additive_curve(fisher.diagonal()), order=fisher_curve(fisher).order)


def _layer_losses(
    model: nn.Module, config: PruningConfig, layers: Mapping[str, Any], batches: Batches, progress: bool
) -> dict[str, float]:
    """How much removing each layer costs, in the units of the criterion."""
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
    return {name: sum(map(sum_of_squares, module.parameters())) for name, module in modules.items()}


def _meet_budget(
    model: nn.Module,
    config: PruningConfig,
    plan: UnitPlan,
    lists: Sequence[LayerList],
    solve: Callable[[Costs, float], Choice],
) -> tuple[Choice, SpeedRecord | None]:
    """The choice within the budget of the config, and the measured speed-up if that is the budget."""
    costs, layers = plan.parameters, plan.layers
    dense = costs.total({}, (), layers)
    if config.target_speedup is not None:
        return _meet_speedup(model, config, plan, lists, solve)
    if config.target_flops is not None:
        inputs = workload_inputs(model, config.workload)
        costs = measured_costs(model, plan.sites, lists, layers, lambda models: flops(models, inputs), "linear")
        return solve(costs, config.target_flops * costs.total({}, (), layers)), None
    if config.target_params is not None:
        return solve(costs, config.target_params * dense), None
    assert config.sparsity is not None
    prunable = dense - costs.base if layers else sum(float(c[-1]) for c in costs.groups.values())
    return solve(costs, dense - config.sparsity * prunable), None


def _meet_speedup(
    model: nn.Module,
    config: PruningConfig,
    plan: UnitPlan,
    lists: Sequence[LayerList],
    solve: Callable[[Costs, float], Choice],
) -> tuple[Choice, SpeedRecord]:
    """Sizes whose measured speed-up meets the target: the budget is corrected until it does."""
    assert config.target_speedup is not None
    inputs = workload_inputs(model, config.workload)
    costs = latency_costs(model, plan.sites, lists, plan.layers, inputs)
    dense = costs.total({}, (), plan.layers)
    budget = dense / config.target_speedup
    best: tuple[float, Choice, SpeedRecord] | None = None
    # (log of a budget, log of how far its speed-up is off): the closest attempts below and above the target.
    slow, fast = None, None
    for _ in range(_MAX_ATTEMPTS):
        choice = solve(costs, budget)
        removed = {group for layer in choice.layers for group in plan.layers[layer]}
        kept = {name: units for name, units in choice.kept.items() if name not in removed}
        twin = variant(model, plan.sites, kept, [*choice.layers])
        record = measured_speedup(model, twin, inputs, config.workload)
        predicted = dense / costs.total(choice.kept, choice.layers, plan.layers)
        record = record.with_prediction(config.target_speedup, predicted)
        agreed = broadcast(torch.tensor([record.measured, record.low, record.high, record.predicted])).tolist()
        record = dataclasses.replace(record, **dict(zip(("measured", "low", "high", "predicted"), agreed, strict=True)))
        miss = abs(record.measured / config.target_speedup - 1)
        if best is None or miss < best[0]:
            best = (miss, choice, record)
        if miss <= _TOLERANCE:
            break
        off = math.log(record.measured / config.target_speedup)
        slow, fast = ((math.log(budget), off), fast) if off < 0 else (slow, (math.log(budget), off))
        if slow is not None and fast is not None:
            # Interpolate between the two, but move by at least a tenth: measurements are noisy.
            share = min(0.9, max(0.1, -slow[1] / (fast[1] - slow[1])))
            budget = math.exp(slow[0] + share * (fast[0] - slow[0]))
        else:
            budget *= record.measured / config.target_speedup
    assert best is not None
    return best[1], best[2]
