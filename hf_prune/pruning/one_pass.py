"""One pass: all weights are decided, and repaired, on statistics of the model as it is."""

from __future__ import annotations

import dataclasses

import torch

from hf_prune.calibration.statistics import collect_stats
from hf_prune.criteria.base import CURVATURE
from hf_prune.planning.plan import PruningPlan
from hf_prune.pruning.compute_masks import compute_masks_synced
from hf_prune.pruning.fisher import prune_by_fisher
from hf_prune.pruning.run import CalibrationRun, Result
from hf_prune.pruning.transaction import Transaction
from hf_prune.utils.offload_cache import OffloadCache


def prune_in_one_pass(run: CalibrationRun[PruningPlan], _: Transaction | None = None) -> Result:
    """Compute the masks of a plan, and repaired weights, without writing anything.

    Args:
        run: The model, its plan and the data.

    Returns:
        Masks, and new values of weights.

    Raises:
        CalibrationError: If batches are unusable.
    """
    run = with_fixed_masks(run)
    stats = collect_stats(run.model, run.plan, run.batches, run.progress)
    return compute_masks_synced(run.model, run.plan, stats, run.previous_masks, run.fixed_masks)


@torch.no_grad()
def with_fixed_masks(run: CalibrationRun[PruningPlan]) -> CalibrationRun[PruningPlan]:
    """Compute the masks first where a repair can only start once all of them are known.

    In scope global no weight is decided before the scores of all are known, and blocks of the Fisher matrix are
    gathered on the dense model. The model is not changed.

    Args:
        run: What is pruned.

    Returns:
        The run with ``fixed_masks``; the same run if its repair can start layer by layer.
    """
    config = run.plan.config
    if run.fixed_masks is not None or config.repair is None:
        return run
    if config.scope != "global" and not run.plan.needs & CURVATURE:
        return run
    config = config.replace(repair=None, objective="layer", calibration_order="one_pass")
    plan = dataclasses.replace(run.plan, config=config)
    masks_only = dataclasses.replace(run, plan=plan)
    if not plan.needs & CURVATURE:
        return dataclasses.replace(run, fixed_masks=prune_in_one_pass(masks_only)[0])
    unused = OffloadCache(0)  # weights by the criterion's own update; the repair finds others
    try:
        return dataclasses.replace(run, fixed_masks=prune_by_fisher(masks_only, plan, run.previous_masks, unused))
    finally:
        unused.close()
