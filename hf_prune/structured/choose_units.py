"""Choose which heads, neurons and layers are removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_prune.architectures.cut_units import refuse_shared
from hf_prune.architectures.discovery.find import discover
from hf_prune.architectures.discovery.refusals import reasons_for
from hf_prune.architectures.entries import is_in_table
from hf_prune.architectures.kinds.registry import kind_named
from hf_prune.architectures.layers import layer_lists
from hf_prune.architectures.modules import base_prefix
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.calibration.batches import Batches
from hf_prune.calibration.input_reader import CACHE_BYTES
from hf_prune.calibration.sensitivity import Sensitivity
from hf_prune.errors import PlanError
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import refuse_infinite
from hf_prune.planning.parts import is_chosen
from hf_prune.planning.targets import module_matches, quick_pattern
from hf_prune.structured.budget import Choice, Costs, solve_budget, uniform_sizes
from hf_prune.structured.costs import parameter_costs
from hf_prune.structured.gate_statistics import gate_statistics, layer_losses
from hf_prune.structured.layer_losses import greedy_layer_losses, losses_without_data
from hf_prune.structured.loss_curves import Curve
from hf_prune.structured.meet_budget import layer_hint, meet_budget, most_layers, sizes_of
from hf_prune.structured.reconstruction import Reading, reconstruction_curves, redundancy_curves
from hf_prune.structured.routing import observe_routing
from hf_prune.structured.unit_plan import UnitPlan, unit_groups_of
from hf_prune.structured.unit_scores import (
    curve_of_scores,
    gate_curve,
    learned_curves,
    random_scores,
    squared_weights,
    sum_of_squares,
    warn_of_missed_experts,
    warn_of_unused_experts,
)
from hf_prune.utils.distributed import broadcast, fail_together
from hf_prune.utils.offloaded_weights import refuse_offloaded


def choose_units(
    model: nn.Module,
    config: PruningConfig,
    calibration: Batches | None = None,
    progress: bool | None = None,
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
    plan = open_plan(model, config)
    groups = plan.sites
    refuse_infinite((p.name, model.get_parameter(p.name).detach()) for group in groups for p in group.slices)
    if (config.learns_units or config.learns_in_training) and calibration is None and scores is None:
        return plan, None
    batches: Batches = []
    sensitivity = None
    if scores is not None:
        curves = learned_curves(groups, scores)
    else:
        batches = calibration or []
        curves, sensitivity = _curves(model, config, groups, batches, progress, cache_bytes)
    return with_choice(model, plan, curves, _layer_losses(model, plan, batches, progress, cache_bytes)), sensitivity


def open_plan(model: nn.Module, config: PruningConfig) -> UnitPlan:
    """What may be removed, with nothing chosen yet. Only the shapes of the model are looked at.

    Raises:
        ArchitectureError: If nobody has said where the units of such a model are.
        PlanError: If nothing may be removed, or packed experts are to be repaired, or weighed against their neurons.
    """
    layer_lists(model)  # refuses what cannot be made smaller
    groups, layers = _candidates(model, config)
    parameters = parameter_costs(model, groups, layers)
    _check_packed(config, groups, parameters)
    return UnitPlan(config, type(model).__name__, tuple(groups), layers, parameters, None, {})


def with_choice(
    model: nn.Module, plan: UnitPlan, curves: Mapping[str, Curve], layer_costs: Mapping[str, float]
) -> UnitPlan:
    """A plan with what stays.

    Args:
        model: The model.
        plan: The plan, with nothing chosen yet.
        curves: What removing units costs, by group. In scope layer they may be missing: how many units stay does not
            depend on them, and which ones is then left open.
        layer_costs: What removing each layer costs.

    Raises:
        PlanError: If the budget cannot be met.
    """
    config, lists, layers = plan.config, layer_lists(model), plan.layers
    sizes = {group.name: sizes_of(config, group) for group in plan.sites}
    losses = {name: curve.losses.flip(0).numpy() for name, curve in curves.items()}
    hint = layer_hint(config)

    def solve(costs: Costs, budget: float) -> Choice:
        with fail_together():
            if config.scope == "layer":
                choice = Choice(uniform_sizes(costs, budget, sizes, hint), frozenset())
            else:
                choice = solve_budget(losses, costs, budget, sizes, layers, layer_costs, hint)
        return _synchronized(choice, list(layers))

    choice, speed = meet_budget(model, config, plan, lists, solve)
    chosen = {name: curves[name] for name in choice.kept if name in curves}
    kept = {n: curve.kept(choice.kept[n]) for n, curve in chosen.items() if choice.kept[n] < curve.order.shape[-1]}
    return dataclasses.replace(plan, choice=choice, kept=kept, speed=speed)


def _check_packed(config: PruningConfig, groups: Sequence[UnitGroup], costs: Costs) -> None:
    """Refuse settings that would repair packed experts, or weigh their neurons against whole experts."""
    if costs.inside and config.scope == "global":
        raise PlanError(
            "experts and the neurons inside them share weights, so one cannot be weighed against the other: use "
            "scope='layer', which removes the same share of both, or prune them one after the other"
        )
    packed = next((group for group in groups if group.choices), None)
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
    refuse_shared(model, (name for group in groups for name in _parameters_of(model, group)))
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


def _parameters_of(model: nn.Module, group: UnitGroup) -> list[str]:
    """The parameters that become smaller with a group, or go with some of its units."""
    own = group.own_parameters(model, range(group.units)) if group.lists else []
    return [*(piece.name for piece in group.slices), *(name for names in own for name in names)]


def _why_none(model: nn.Module, config: PruningConfig) -> str:
    """Why nothing of a model may be removed."""
    if config.only is not None:
        in_part, prefix = is_chosen(model, config), base_prefix(model)
        refused = {} if is_in_table(model) else discover(model).refused
        why = [f"{n}: {reason}" for n, reason in refused.items() if in_part(n) or in_part(prefix + n)]
        return "; ".join(why[:2]) or f"check only ({config.only!r})"
    if config.exclude_modules:
        return f"check exclude_modules ({config.exclude_modules!r})"
    reasons = [reason for kind in config.granularity for reason in kind_named(kind).obstacles(model)]
    if not reasons and tuple(config.granularity) == ("expert",):
        return "it has no layers with experts"
    if not reasons and not is_in_table(model):
        reasons = reasons_for(config.granularity, discover(model).refused)
    return "; ".join(reasons[:2]) or (
        "none was found that can go by itself; describe_units(model) lists what can be removed, and "
        "granularity='channel' prunes convolutions"
    )


def _curves(
    model: nn.Module,
    config: PruningConfig,
    groups: Sequence[UnitGroup],
    batches: Batches,
    progress: bool | None,
    cache_bytes: int,
) -> tuple[dict[str, Curve], Sensitivity | None]:
    """The removal order and losses of each group, and the sensitivity if it was measured on the way."""
    if not groups:
        return {}, None
    reading = Reading.in_memory(model, config, batches, progress, cache_bytes)
    if config.criterion == "reconstruction":
        return reconstruction_curves(model, config, groups, reading)
    if config.criterion in ("fisher", "taylor"):
        pairs = config.criterion == "fisher" and config.repair is None
        statistics = gate_statistics(model, groups, batches, config.seed, progress, pairs)
        missed = {group.name: statistics[group.name].missed for group in groups}
        warn_of_missed_experts(missed, sum(max(1, group.choices) for group in groups))
        if config.criterion == "taylor" or config.repair is None:
            return {
                group.name: gate_curve(model, group, statistics[group.name], config.criterion) for group in groups
            }, None
        diagonals = {name: gates.fisher for name, gates in statistics.items()}
        return redundancy_curves(model, config, groups, reading, diagonals)
    if config.criterion in ("reap", "frequency"):
        routing = observe_routing(model, groups, batches, progress)
        if config.criterion == "reap":
            warn_of_unused_experts(model, groups, {name: seen.tokens for name, seen in routing.items()})
        values = {name: seen.reap if config.criterion == "reap" else seen.frequency for name, seen in routing.items()}
        return {group.name: curve_of_scores(model, group, values[group.name]) for group in groups}, None
    if config.criterion == "random":
        return {g.name: curve_of_scores(model, g, random_scores(model, g, config.seed)) for g in groups}, None
    if config.criterion == "magnitude":
        return {group.name: curve_of_scores(model, group, squared_weights(model, group)) for group in groups}, None
    raise PlanError(f"criterion {config.criterion!r} is registered for units, but choose_units has no curves for it")


def _layer_losses(
    model: nn.Module, plan: UnitPlan, batches: Batches, progress: bool | None, cache_bytes: int
) -> dict[str, float]:
    """How much removing each layer costs, in the units of the criterion."""
    config = plan.config
    modules = {name: model.get_submodule(name) for name in plan.layers}
    if not modules:
        return {}
    if config.criterion == "greedy":
        return greedy_layer_losses(model, modules, batches, most_layers(plan), progress, cache_bytes)
    if config.learns_units:
        return layer_losses(model, modules, batches, progress)
    return losses_without_data(config, modules, sum_of_squares)
