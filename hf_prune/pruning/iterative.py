"""Several steps: gradients are taken anew on the partly pruned model before more is removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hf_prune.calibration.batches import Batches, require_batches
from hf_prune.calibration.input_reader import CACHE_BYTES
from hf_prune.calibration.statistics import collect_stats
from hf_prune.criteria.base import CURVATURE
from hf_prune.kernels.zeroing import zero_removed_
from hf_prune.planning.plan import PruningPlan
from hf_prune.pruning.compute_masks import compute_masks_synced
from hf_prune.pruning.fisher import prune_by_fisher
from hf_prune.pruning.transaction import WeightBackup
from hf_prune.utils.offload_cache import OffloadCache


def step_sparsities(steps: int, start: float, end: float) -> list[float]:
    """Sparsities after each step, of which each removes the same share of what is left.

    Args:
        steps: How many.
        start: Sparsity before the first one.
        end: Sparsity after the last one; where it is 1, the steps before go to 0.99.

    Example:
        >>> [round(share, 3) for share in shares(3, 0.0, 0.875)]
        [0.5, 0.75, 0.875]
    """
    left = max(1 - end, 0.01)
    geometric = (
        [1 - (1 - start) * (left / (1 - start)) ** (step / steps) for step in range(1, steps)] if start < 1 else []
    )
    return [*(min(share, end) for share in geometric), end]


def step_plans(plan: PruningPlan) -> Iterator[PruningPlan]:
    """The plans of the steps; the last one is the whole plan. Steps that remove nothing more are left out.

    Every tensor, and every pool of it, comes as near to its own sparsity as the whole does to the config's.
    """
    size = plan.target_parameters
    end = plan.removed_parameters / size
    start = min(sum(tensor.already for tensor in plan.tensors) / size, end)
    before = 0
    for sparsity in step_sparsities(plan.config.steps, start, end)[:-1]:
        part = _scaled(plan, sparsity / end if end else 0.0)
        if before < part.remove < plan.remove:
            yield part
        before = part.remove
    yield plan


def _scaled(plan: PruningPlan, share: float) -> PruningPlan:
    """A plan that removes a share of what the whole plan does, rounded in every pool."""
    tensors = []
    for tensor in plan.tensors:
        pools = tensor.units // tensor.pool
        remove = None if tensor.remove is None else round(share * (tensor.remove // pools)) * pools
        tensors.append(dataclasses.replace(tensor, remove=remove))
    removed = [tensor.remove for tensor in tensors if tensor.remove is not None]
    total = sum(removed) if removed else round(share * plan.remove)
    return dataclasses.replace(plan, tensors=tuple(tensors), remove=total)


@torch.no_grad()
def prune_iteratively(
    model: nn.Module,
    plan: PruningPlan,
    calibration: Batches | None,
    old_masks: Mapping[str, Tensor],
    undo: WeightBackup,
    progress: bool = False,
    cache_bytes: int = CACHE_BYTES,
) -> dict[str, Tensor]:
    """Prune a model, in place, in the steps that the plan's config asks for.

    Args:
        model: The model; its weights are those after pruning when this returns.
        plan: Its plan, of a criterion that learns from gradients.
        calibration: Batches; read into a list.
        old_masks: Masks of earlier prunings, by parameter name.
        undo: Gets every weight before it changes.
        progress: Show progress bars.
        cache_bytes: See :func:`hf_prune.pruning.fisher.prune_by_fisher`.

    Returns:
        Bool masks by parameter name.

    Raises:
        CalibrationError: If batches are missing or unusable.
    """
    batches = list(require_batches(plan.config, calibration))
    parameters = dict(model.named_parameters())
    masks = dict(old_masks)
    for part in step_plans(plan):
        weights = OffloadCache(0)
        try:
            if plan.needs & CURVATURE:
                found = prune_by_fisher(model, part, batches, masks, weights, progress, cache_bytes)
            else:
                stats = collect_stats(model, part, batches, progress)
                found, _ = compute_masks_synced(model, part, stats, masks)
            for name, mask in found.items():
                masks[name] = mask & masks[name].to(mask.device) if name in masks else mask
                undo.save(name, parameters[name])
                if name in weights:
                    parameters[name].copy_(weights.get(name))
                zero_removed_(parameters[name], masks[name])
        finally:
            weights.close()
    return {tensor.target.name: masks[tensor.target.name] for tensor in plan.tensors}


@torch.no_grad()
def masks_before_repair(
    model: nn.Module,
    plan: PruningPlan,
    batches: Batches,
    old_masks: Mapping[str, Tensor],
    progress: bool = False,
    cache_bytes: int = CACHE_BYTES,
) -> dict[str, Tensor]:
    """The masks of a plan whose repair can only begin once all of them are known; the model is not changed.

    Args:
        model: The model.
        plan: Its plan, of a criterion that does not learn from the inputs of pruned layers.
        batches: Calibration batches.
        old_masks: Masks of earlier prunings, by parameter name.
        progress: Show progress bars.
        cache_bytes: See :func:`hf_prune.pruning.fisher.prune_by_fisher`.
    """
    config = plan.config.replace(repair=None, objective="layer", calibration_order="one_pass")
    plan = dataclasses.replace(plan, config=config)
    if plan.needs & CURVATURE:
        weights = OffloadCache(0)
        try:
            return prune_by_fisher(model, plan, batches, old_masks, weights, progress, cache_bytes)
        finally:
            weights.close()
    return compute_masks_synced(model, plan, collect_stats(model, plan, batches, progress), old_masks)[0]
