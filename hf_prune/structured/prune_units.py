"""Pruning of whole heads, neurons and layers: choose, mask, repair. ``shrink()`` then takes them out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from hf_prune.calibration.batches import Batches
from hf_prune.calibration.dense_outputs import DenseOutputs
from hf_prune.calibration.input_reader import CACHE_BYTES
from hf_prune.calibration.sensitivity import Sensitivity
from hf_prune.calibration.statistics import collect_stats
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.plan import targets_of
from hf_prune.pruning.bypass import bypass, is_bypassed, restore
from hf_prune.pruning.compute_masks import compute_masks_synced
from hf_prune.pruning.mask_store import MaskStore, warn_regrown
from hf_prune.pruning.polish import polish
from hf_prune.pruning.sequential import prune_sequentially
from hf_prune.pruning.transaction import WeightBackup
from hf_prune.structured.choose_units import choose_units
from hf_prune.structured.reconstruction import inner_plan, repaired_weights
from hf_prune.structured.unit_plan import UnitPlan, unit_batches
from hf_prune.utils.forward import as_batches

Model = TypeVar("Model", bound=nn.Module)


def prune_units(
    model: Model,
    config: PruningConfig,
    *,
    calibration: Batches | None = None,
    keep_dense: bool = False,
    progress: bool = False,
    cache_bytes: int = CACHE_BYTES,
    polish_data: Batches | None = None,
) -> Model:
    """Mask heads, neurons and layers of a model, in place; see :func:`hf_prune.prune`.

    A head or neuron that goes has all its weights and biases masked. With ``repair="least_squares"`` what is left of
    the matrices is solved anew, layer by layer. A layer that goes is bypassed as well.

    Raises:
        ArchitectureError: If nobody has said where the units of such a model are.
        PlanError: If the budget cannot be met.
        CalibrationError: If calibration data is missing or unusable.
        MaskError: As :func:`hf_prune.prune`.
    """
    store = MaskStore.of(model) or MaskStore()
    store.check(model)
    warn_regrown(model, "they become zero now")
    if keep_dense:
        store.check_dense()
    batches = unit_batches(config, calibration, polish_data)
    with ExitStack() as context:
        plan, sensitivity = choose_units(model, config, batches, progress, cache_bytes)
        if sensitivity is not None:
            context.callback(sensitivity.close)
        masks = unit_masks(model, plan)
        repaired = repaired_weights(model, config, [site for site in plan.sites if not plan.is_gone(site)])
        undo = context.enter_context(WeightBackup(model, in_memory=keep_dense or store.dense is not None))
        dense = None
        if config.polish is not None:
            inner = inner_plan(model, config, [name for name in plan.weights if model.get_parameter(name).numel()])
            cache_bytes //= 2  # one half for the polish, one for the repair
            data = batches if polish_data is None else list(as_batches(polish_data))
            assert data is not None
            dense = context.enter_context(DenseOutputs(model, targets_of(inner), data, cache_bytes, progress))
        assert plan.choice is not None
        gone = [layer for layer in map(model.get_submodule, sorted(plan.choice.layers)) if not is_bypassed(layer)]
        for layer in gone:
            undo.calls(partial(restore, layer))
            bypass(layer)
        if repaired:
            _repair(model, config, repaired, masks, batches, store, undo, progress, cache_bytes, sensitivity)
        undo.write(masks, {})
        record = None
        if dense is not None:
            kept = {name: mask & store.masks.get(name, mask).to(mask.device) for name, mask in masks.items()}
            record = polish(model, {**store.masks, **kept}, dense, undo, config, progress)
        store.speed = plan.speed
        if record is not None:
            store.polishes = (*store.polishes, record)
        store.update(model, masks, {}, config, keep_dense, undo.dense)
    return model


def _repair(
    model: nn.Module,
    config: PruningConfig,
    names: list[str],
    masks: Mapping[str, Tensor],
    batches: Batches | None,
    store: MaskStore,
    undo: WeightBackup,
    progress: bool,
    cache_bytes: int,
    sensitivity: Sensitivity | None,
) -> None:
    given = {name: masks[name] for name in names}
    size = sum(mask.numel() for mask in given.values())
    gone = sum(int((~mask).sum()) for mask in given.values())
    given |= {name: mask for name, mask in masks.items() if name.endswith(".bias")}
    plan = inner_plan(model, config, names, gone / size)
    if config.calibration_order == "sequential":
        prune_sequentially(model, plan, batches, store.masks, undo, progress, cache_bytes, sensitivity, given)
    else:
        found, weights = compute_masks_synced(
            model, plan, collect_stats(model, plan, batches, progress), store.masks, given
        )
        undo.write(found, weights)


def unit_masks(model: nn.Module, plan: UnitPlan) -> dict[str, Tensor]:
    """Bool masks by parameter name, True = keep, of everything that belongs to a unit, and of layers that go.

    Args:
        model: The model.
        plan: Its plan, with what stays.
    """
    assert plan.choice is not None
    masks: dict[str, Tensor] = {}
    for site in plan.sites:
        if plan.is_gone(site):
            continue
        units = plan.kept.get(site.name, torch.arange(site.units))
        for part in site.slices:
            parameter = model.get_parameter(part.name)
            along = torch.zeros(parameter.shape[part.dim], dtype=torch.bool)
            along[part.index(units)] = True
            shape = [1] * parameter.dim()
            shape[part.dim] = -1
            mask = along.view(shape).expand(parameter.shape).to(parameter.device)
            masks[part.name] = masks[part.name] & mask if part.name in masks else mask.clone()
    for layer in plan.choice.layers:
        for name, parameter in model.get_submodule(layer).named_parameters():
            masks[f"{layer}.{name}"] = torch.zeros_like(parameter, dtype=torch.bool)
    return masks
