"""Pruning of whole heads, neurons and layers: choose, mask, repair. ``shrink()`` then cuts them out."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from hf_prune.architectures.cut_units import tensor_cuts
from hf_prune.architectures.kinds.registry import kind_named
from hf_prune.architectures.unit_groups import staying_mask
from hf_prune.calibration.batches import Batches, needed_batches
from hf_prune.errors import PlanError
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.plan import PruningPlan
from hf_prune.pruning.mask_store import checked_masks
from hf_prune.pruning.one_pass import prune_in_one_pass
from hf_prune.pruning.run import CalibrationRun, MemoryBudget, Result
from hf_prune.pruning.sequential import prune_sequentially
from hf_prune.pruning.transaction import Transaction
from hf_prune.structured.choose_units import choose_units
from hf_prune.structured.close_gaps import close_gaps, warn_of_open_gaps
from hf_prune.structured.reconstruction import inner_plan, repaired_weights
from hf_prune.structured.routing import refuse_unequal_routers
from hf_prune.structured.shrink_record import holding_layers
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.utils.notices import warn_user


def plan_units(
    model: nn.Module,
    config: PruningConfig,
    calibration: Batches | None,
    polish_data: Batches | None,
    dry_run: bool,
    progress: bool | None,
    memory: MemoryBudget,
) -> CalibrationRun[UnitPlan]:
    """Choose the heads, neurons and layers that are removed; the model is not changed.

    Args:
        model: The model.
        config: The settings.
        calibration: Batches, for settings that learn from them.
        polish_data: Batches of the polish, if others.
        dry_run: Whether only the plan is asked for, which stays open without batches.
        progress: Show progress bars.
        memory: How much is kept in memory.

    Returns:
        The plan with what its pruning needs; its sensitivity is to be closed.

    Raises:
        ArchitectureError: If the architecture of the model is not registered.
        PlanError: If the budget cannot be met, or layers would keep different numbers of experts, for which the loss
            that balances routers has no use, and the config asks for it.
        CalibrationError: If calibration data is missing or unusable.
    """
    batches = None
    if not dry_run or (calibration is not None and config.learns_units):
        batches = needed_batches(config, calibration, polish_data)
    plan, sensitivity = choose_units(model, config, batches, progress, memory.shared)
    try:
        refuse_unequal_routers(model, plan.kept, plan.choice.layers if plan.choice is not None else frozenset())
    except PlanError:
        if sensitivity is not None:
            sensitivity.close()
        raise
    return CalibrationRun(model, plan, memory, batches, checked_masks(model), progress, sensitivity)


def prune_units(run: CalibrationRun[UnitPlan], change: Transaction) -> Result:
    """Mask heads, neurons and layers of a model.

    All weights and biases of a removed head or neuron are masked. With ``repair="least_squares"`` the remaining weights
    of the matrices get new values, layer by layer. A removed layer is bypassed as well; if only layers go, the repair
    solves for the matrix before each gap.

    Args:
        run: The model, its plan and the data.
        change: Switches layers off and writes repaired weights.

    Returns:
        Masks, and new values of weights.
    """
    model, plan = run.model, run.plan
    assert plan.choice is not None
    masks = unit_masks(model, plan)
    for layer in sorted(plan.choice.layers):
        change.bypass(model.get_submodule(layer))
    for group in plan.sites:
        if group.name in plan.kept and not plan.is_gone(group) and not kind_named(group.kind).zeros_suffice:
            change.switch_off(group, plan.kept[group.name])
    change.store.speed = plan.speed
    if plan.speed is not None and plan.speed.missed:
        warn_user(plan.speed.missed)
    if plan.config.repair is not None and not plan.sites:
        solved = close_gaps(
            model,
            plan.choice.layers,
            run.data,
            lambda weights: change.overwrite({}, weights),
            run.progress,
            run.memory.single,
        )
        if not solved:
            warn_of_open_gaps(model, plan.config.repair)
        return masks, {}
    names = repaired_weights(model, plan.config, [group for group in plan.sites if not plan.is_gone(group)])
    if not names:
        return masks, {}
    return masks, _repair(run, change, names, masks)


def _repair(
    run: CalibrationRun[UnitPlan], change: Transaction, names: list[str], masks: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """New values for the remaining weights of some matrices, where they are not written already."""
    config = run.plan.config
    fixed = {name: masks[name] for name in names}
    removed = sum(int((~mask).sum()) for mask in fixed.values())
    plan = inner_plan(run.model, config, names, removed / sum(mask.numel() for mask in fixed.values()))
    fixed |= {name: mask for name, mask in masks.items() if name.endswith(".bias")}
    strategy = prune_sequentially if config.calibration_order == "sequential" else prune_in_one_pass
    repair = CalibrationRun(
        run.model, plan, run.memory, run.batches, run.previous_masks, run.progress, run.sensitivity, fixed
    )
    return strategy(repair, change)[1]


def trained_plan(run: CalibrationRun[UnitPlan]) -> PruningPlan:
    """A plan whose targets are the matrices that a polish trains: those that may lose units."""
    names = [name for name in run.plan.weights if run.model.get_parameter(name).numel()]
    return inner_plan(run.model, run.plan.config, names)


def unit_masks(model: nn.Module, plan: UnitPlan, only: Collection[str] | None = None) -> dict[str, Tensor]:
    """Bool masks by parameter name, True = keep, of everything that belongs to a unit, and of removed layers.

    What a removed layer shares with a module that stays has none.

    Args:
        model: The model.
        plan: Its plan, with the units that stay.
        only: Parameters of units; None for all, and those of removed layers.
    """
    assert plan.choice is not None
    masks: dict[str, Tensor] = {}

    def is_asked(name: str) -> bool:
        return only is None or name in only

    def nothing(name: str) -> Tensor:
        parameter = model.get_parameter(name)
        return torch.zeros(parameter.shape, dtype=torch.bool, device="cpu" if parameter.is_meta else parameter.device)

    for site in plan.sites:
        if plan.is_gone(site):
            continue
        units = plan.kept.get(site.name, torch.arange(site.units))
        parameters = {piece.name for piece in site.slices}
        for name, dim, index in tensor_cuts([site], {site.name: units}):  # all parts of a matrix that hold its units
            if name in parameters and is_asked(name):
                mask = staying_mask(nothing(name), dim, index)
                masks[name] = masks[name] & mask if name in masks else mask.clone()
        removed = sorted(set(range(site.units)) - set(units.tolist())) if site.lists else []
        for name in (name for names in site.own_parameters(model, removed) for name in names if is_asked(name)):
            masks[name] = nothing(name)
    for name, holding in holding_layers(model, plan.choice.layers).items() if only is None else ():
        if None not in holding:
            masks[name] = nothing(name)
    return masks
