"""Meet a budget in parameters, operations or seconds of a workload."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from hf_prune.architectures.layer_list import LayerList
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.errors import PlanError
from hf_prune.inference.speedup import measured_speedup, workload_inputs
from hf_prune.kernels.fast_products import ordinary_products
from hf_prune.planning.config import PruningConfig
from hf_prune.pruning.records import SpeedRecord
from hf_prune.structured.budget import Choice, Costs, allowed_sizes
from hf_prune.structured.costs import flops, measured_costs, variant
from hf_prune.structured.latency_costs import latency_costs
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.utils.distributed import broadcast

_MAX_ATTEMPTS = 6  # at meeting a speed-up; each corrects the budget by what was measured
_TOLERANCE = 0.02  # by which a measured speed-up may miss the target, as a share of it


def sizes_of(config: PruningConfig, group: UnitGroup) -> np.ndarray:
    """The numbers of units that a group may keep, rising."""
    return allowed_sizes(group.units, group.minimum, math.lcm(config.round_to, group.runs, group.step))


def most_layers(plan: UnitPlan) -> int:
    """How many layers may have to go for the budget of a plan; generous where it is in operations or seconds."""
    config, costs = plan.config, plan.parameters
    dense = costs.total({}, (), plan.layers)
    inside = dense - costs.base
    if config.sparsity is not None:
        share = config.sparsity
    elif config.target_params is not None:
        share = (1 - config.target_params) * dense / inside
    else:
        target = 1 / config.target_speedup if config.target_speedup is not None else config.target_flops
        share = 1.25 * (1 - (target or 0.0)) * dense / inside
    return math.ceil(share * len(plan.layers)) + 1


def meet_budget(
    model: nn.Module,
    config: PruningConfig,
    plan: UnitPlan,
    lists: Sequence[LayerList],
    solve: Callable[[Costs, float], Choice],
) -> tuple[Choice, SpeedRecord | None]:
    """The choice within the budget of the config, and the measured speed-up if that is the budget.

    Args:
        model: The model, which is not changed.
        config: The settings.
        plan: What may be removed.
        lists: The stacks of layers of the model.
        solve: The best choice within a budget, from costs and the budget in their unit.

    Raises:
        PlanError: If the budget cannot be met.
    """
    costs, layers = plan.parameters, plan.layers
    dense = costs.total({}, (), layers)
    if config.target_speedup is not None:
        with ordinary_products():
            return _meet_speedup(model, config, plan, lists, solve)
    if config.target_flops is not None:
        inputs = workload_inputs(model, config.workload)
        workload = config.workload or {}
        costs = measured_costs(
            model, plan.sites, lists, layers, lambda models: flops(models, inputs, workload), "linear"
        )
        return solve(costs, config.target_flops * costs.total({}, (), layers)), None
    if config.target_params is not None:
        return solve(costs, config.target_params * dense), None
    assert config.sparsity is not None
    prunable = dense - costs.base if layers else sum(float(c[-1]) for c in costs.groups.values())
    return solve(costs, dense - config.sparsity * prunable), None


def layer_hint(config: PruningConfig) -> str:
    """What else can be done about a budget out of reach: whole layers may go, if they may not yet."""
    return "" if "layer" in config.granularity else ", or add 'layer' to the granularity"


def _meet_speedup(
    model: nn.Module,
    config: PruningConfig,
    plan: UnitPlan,
    lists: Sequence[LayerList],
    solve: Callable[[Costs, float], Choice],
) -> tuple[Choice, SpeedRecord]:
    """Sizes whose measured speed-up meets the target: the budget is corrected until it does."""
    assert config.target_speedup is not None
    assert config.workload is not None
    inputs = workload_inputs(model, config.workload)
    costs = latency_costs(model, plan.sites, lists, plan.layers, inputs, config.workload)
    dense = costs.total({}, (), plan.layers)
    budget = dense / config.target_speedup
    least = costs.total({g.name: int(sizes_of(config, g)[0]) for g in plan.sites}, plan.layers, plan.layers)
    most = dense / least if least > 0 else math.inf  # errors of many sizes add up; what is chosen is timed itself
    if not broadcast(torch.tensor(most >= config.target_speedup)):
        raise PlanError(
            f"the model becomes at most {most:.2f} times as fast on the workload {dict(config.workload)}, with all "
            f"{'s and '.join(config.granularity)}s gone that may go, and {config.target_speedup:g} were asked for: ask "
            f"for less, or for a larger workload{layer_hint(config)}"
        )
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
