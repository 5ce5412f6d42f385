"""Layer by layer: each weight is pruned on the outputs of the pruned layers before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.input_reader import InputReader
from hf_prune.calibration.output_matching import OutputMatcher
from hf_prune.calibration.sensitivity import sensitivity_of
from hf_prune.calibration.statistics import collect_stats
from hf_prune.calibration.trial import NotAlikeError
from hf_prune.criteria.base import GRADIENTS, INPUTS, WeightStats, derived_seed
from hf_prune.kernels.matrix import Target
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.planning.plan import PlannedTensor, PruningPlan, targets_of
from hf_prune.planning.targets import bias_names
from hf_prune.pruning.compute_masks import compute_masks_synced
from hf_prune.pruning.one_pass import with_fixed_masks
from hf_prune.pruning.run import CalibrationRun, Result
from hf_prune.pruning.transaction import Transaction
from hf_prune.utils.progress import Bar


@torch.no_grad()
def prune_sequentially(run: CalibrationRun[PruningPlan], change: Transaction) -> Result:
    """Prune a model, in place, so that each target sees the inputs that the pruned model gives it.

    Targets with the same input (query, key and value) are pruned together. Only the statistics of one such step are in
    memory at a time, and no second copy of the weights.

    Args:
        run: The model, its plan, of scope row or layer unless the masks are fixed, and the data.
        change: Writes the weights of each step.

    Returns:
        Masks; the weights are written already.

    Raises:
        CalibrationError: If batches are unusable.
    """
    run = with_fixed_masks(run)
    try:
        return _prune(run, change, reuse=True), {}
    except NotAlikeError:  # outputs of the dense model can only be recorded before it is pruned: start over
        change.restore_weights()
        return _prune(run, change, reuse=False), {}


def _prune(run: CalibrationRun[PruningPlan], change: Transaction, reuse: bool) -> PackedMasks:
    """:func:`prune_sequentially`, with finished blocks that return recorded outputs (``reuse``), or compute them."""
    model, plan, progress = run.model, run.plan, run.progress
    dense_stats: Mapping[str, WeightStats] = {}
    if run.fixed_masks is None and (gradients := plan.needs & GRADIENTS):  # taken on the dense model
        dense_config = plan.config.replace(repair=None, objective="layer")
        dense_stats = collect_stats(model, dataclasses.replace(plan, config=dense_config), run.batches, progress)
        assert gradients <= plan.criterion.needs
    biases = bias_names(model, targets_of(plan)) if plan.config.repair is not None else {}
    planned = {tensor.target.name: tensor for tensor in plan.tensors}
    masks = PackedMasks()

    def prune_step(step: list[Target], gathered: dict[str, dict[str, Tensor]], bar: Any) -> None:
        for name in (target.name for target in step):
            mask, weights = prune_tensor(
                model,
                plan,
                planned[name],
                gathered.pop(name),
                run.previous_masks,
                dense_stats.get(name),
                run.fixed_masks,
                biases,
            )
            masks[name] = mask
            removed = {name: mask}
            if name in run.previous_masks:
                removed[name] = mask & run.previous_masks[name].to(mask.device)
            if run.fixed_masks is not None:  # biases of units that are removed
                removed |= {bias: run.fixed_masks[bias] for bias in weights.keys() - {name} & run.fixed_masks.keys()}
            change.overwrite(removed, weights)
            bar.update()

    by_loss = plan.config.objective == "loss"
    cache_bytes = run.memory.shared if by_loss else run.memory.single
    with ExitStack() as context:
        reader = context.enter_context(
            InputReader(model, targets_of(plan), run.data, reuse, cache_bytes, trials=run.trials)
        )
        bar: Bar[object] = context.enter_context(
            Bar(total=len(plan.tensors), desc="Pruning", unit="weight", progress=progress)
        )
        steps = reader.order()
        if not by_loss:
            for step in steps:
                prune_step(step, reader.gather(step, plan.needs & INPUTS), bar)
                reader.finish(step)
            return masks
        sensitivity = run.sensitivity
        if sensitivity is None:
            sensitivity = sensitivity_of(reader, plan.config.seed, progress, cache_bytes)
            context.callback(sensitivity.close)
        matcher = context.enter_context(
            OutputMatcher(model, targets_of(plan), run.data, sensitivity, cache_bytes, reuse, trials=run.trials)
        )
        for segment in matcher.segments(steps):
            for step in segment:
                prune_step(step, matcher.gather(reader, step), bar)
                reader.finish(step)
    return masks


def prune_tensor(
    model: nn.Module,
    plan: PruningPlan,
    tensor: PlannedTensor,
    gathered: Mapping[str, Any],
    previous_masks: Mapping[str, Tensor],
    dense_stats: WeightStats | None = None,
    fixed_masks: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, str] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the mask of one target; the model is not changed.

    Args:
        model: The model.
        plan: Its plan.
        tensor: What the plan says of the target.
        gathered: Statistics of the inputs of the target.
        previous_masks: Masks of earlier prunings, by parameter name.
        dense_stats: Its other statistics.
        fixed_masks: Masks that are known already.
        biases: The names of the biases of targets, as of :func:`compute_masks`.

    Returns:
        Its mask, and by name its weight and bias where these get new values.
    """
    name = tensor.target.name
    stats = dataclasses.replace(dense_stats or WeightStats(seed=derived_seed(plan.config.seed, name)), **gathered)
    part = dataclasses.replace(plan, tensors=(tensor,))
    masks, weights = compute_masks_synced(model, part, {name: stats}, previous_masks, fixed_masks, biases)
    return masks[name], weights
