"""Pruning of whole heads, neurons and layers: choose, mask, repair. ``shrink()`` then takes them out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor, nn

from hf_prune.activations import CACHE_BYTES, Batches
from hf_prune.bypass import bypass, is_bypassed, restore
from hf_prune.calibration import collect_stats
from hf_prune.config import PruningConfig
from hf_prune.dense_outputs import DenseOutputs
from hf_prune.errors import CalibrationError
from hf_prune.masking import MaskStore, Undo
from hf_prune.polish import polish
from hf_prune.scoring import agreed_masks
from hf_prune.sequential import prune_in_order
from hf_prune.unit_plan import UnitPlan, make_unit_plan
from hf_prune.unit_reconstruction import consumer_plan

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

    A head or neuron that goes has all its weights and biases masked. With ``repair="least_squares"`` the matrices that
    consume what is left are solved anew, layer by layer. A layer that goes is bypassed as well.

    Raises:
        ArchitectureError: If nobody has said where the units of such a model are.
        PlanError: If the budget cannot be met.
        CalibrationError: If calibration data is missing or unusable.
        MaskError: As :func:`hf_prune.prune`.
    """
    store = MaskStore.of(model) or MaskStore()
    store.check(model)
    if keep_dense:
        store.check_dense()
    if calibration is None and (config.learns_units or config.repair is not None):
        who = f"criterion {config.criterion!r}" if config.learns_units else f"repair={config.repair!r}"
        raise CalibrationError(
            f"{who} needs calibration data, and got none: pass calibration=batches, an iterable of dicts with the "
            f"model's inputs"
        )
    batches = None if calibration is None else list(calibration)
    plan = make_unit_plan(model, config, batches, progress, cache_bytes)
    masks = unit_masks(model, plan)
    consumers = _consumers(model, plan, masks)
    with ExitStack() as context:
        undo = context.enter_context(Undo(model, in_memory=keep_dense or store.dense is not None))
        dense = None
        if config.polish is not None:
            inner = consumer_plan(model, config, consumers)
            cache_bytes //= 2  # one half for the polish, one for the repair
            data = batches if polish_data is None else list(polish_data)
            if not data:
                raise CalibrationError("polish needs calibration data, and got none: pass calibration=batches")
            dense = context.enter_context(DenseOutputs(model, inner, data, cache_bytes, progress))
        assert plan.choice is not None
        gone = [layer for layer in map(model.get_submodule, sorted(plan.choice.layers)) if not is_bypassed(layer)]
        switched = context.enter_context(ExitStack())
        for layer in gone:
            bypass(layer)
            switched.callback(restore, layer)
        if config.repair is not None and consumers:
            _repair(model, config, consumers, masks, batches, store, undo, progress, cache_bytes)
        undo.write(masks, {})
        record = None
        if dense is not None:
            kept = {name: mask & store.masks.get(name, mask).to(mask.device) for name, mask in masks.items()}
            record = polish(model, {**store.masks, **kept}, dense, undo, config, progress)
        store.update(model, masks, {}, config, keep_dense, undo.dense)
        store.speed = plan.speed
        if record is not None:
            store.polishes = (*store.polishes, record)
        switched.pop_all()
    return model


def _repair(
    model: nn.Module,
    config: PruningConfig,
    consumers: list[str],
    masks: Mapping[str, Tensor],
    batches: Batches | None,
    store: MaskStore,
    undo: Undo,
    progress: bool,
    cache_bytes: int,
) -> None:
    given = {name: masks[name] for name in consumers}
    size = sum(mask.numel() for mask in given.values())
    old = sum(int((~store.masks[name]).sum()) for name in consumers if name in store.masks)
    gone = sum(int((~mask).sum()) for mask in given.values())
    plan = consumer_plan(model, config, consumers, max(gone, old) / size)
    if config.calibration_order == "sequential":
        prune_in_order(model, plan, batches, store.masks, undo, progress, cache_bytes, given=given)
    else:
        found, weights = agreed_masks(model, plan, collect_stats(model, plan, batches, progress), store.masks, given)
        undo.write(found, weights)


def _consumers(model: nn.Module, plan: UnitPlan, masks: Mapping[str, Tensor]) -> list[str]:
    """Matrices that consume what is left of a site, whether or not it lost something: what flows in has changed."""
    return [
        part.name
        for site in plan.sites
        for part in site.consumers
        if not plan.is_gone(site) and model.get_parameter(part.name).numel()
    ]


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
        for part in site.parts:
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
