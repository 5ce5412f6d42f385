"""Iterative pruning: gradients are taken again on the partly pruned model before more is removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from hf_prune.calibration.statistics import collect_stats
from hf_prune.criteria.base import CURVATURE
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.planning.plan import PruningPlan
from hf_prune.pruning.compute_masks import compute_masks_synced
from hf_prune.pruning.fisher import prune_by_fisher
from hf_prune.pruning.run import CalibrationRun, Result
from hf_prune.pruning.transaction import Transaction
from hf_prune.utils.offload_cache import OffloadCache


def step_sparsities(steps: int, start: float, end: float) -> list[float]:
    """Sparsities after each step, where every step removes the same share of what the one before left.

    Args:
        steps: How many.
        start: Sparsity before the first one.
        end: Sparsity after the last one; where it is 1, the steps before go to 0.99.

    Example:
        >>> [round(share, 3) for share in step_sparsities(3, 0.0, 0.875)]
        [0.5, 0.75, 0.875]
    """
    kept = max(1 - end, 0.01)
    geometric = (
        [1 - (1 - start) * (kept / (1 - start)) ** (step / steps) for step in range(1, steps)] if start < 1 else []
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
        by_slab = tuple(round(share * (number // tensor.grain)) * tensor.grain for number in tensor.by_slab)
        tensors.append(dataclasses.replace(tensor, remove=sum(by_slab) if by_slab else remove, by_slab=by_slab))
    removed = [tensor.remove for tensor in tensors if tensor.remove is not None]
    total = sum(removed) if removed else round(share * plan.remove)
    return dataclasses.replace(plan, tensors=tuple(tensors), remove=total)


@torch.no_grad()
def prune_iteratively(run: CalibrationRun[PruningPlan], change: Transaction) -> Result:
    """Prune a model, in place, in the steps that the config asks for.

    Args:
        run: The model, its plan, of a criterion that learns from gradients, and the data.
        change: Writes the weights after each step.

    Returns:
        Masks; the weights are written already.

    Raises:
        CalibrationError: If batches are unusable.
    """
    masks = PackedMasks(run.previous_masks)
    for part in step_plans(run.plan):
        weights = OffloadCache(0)
        try:
            if part.needs & CURVATURE:
                step_masks = prune_by_fisher(run, part, masks, weights)
            else:
                stats = collect_stats(run.model, part, run.batches, run.progress)
                step_masks, _ = compute_masks_synced(run.model, part, stats, masks)
            for name, mask in step_masks.items():
                mask = mask & masks[name].to(mask.device) if name in masks else mask
                masks[name] = mask
                change.overwrite({name: mask}, {name: weights.get(name)} if name in weights else {})
        finally:
            weights.close()
    planned = [tensor.target.name for tensor in run.plan.tensors]
    return PackedMasks.sharing({name: masks.packed[name] for name in planned}), {}
