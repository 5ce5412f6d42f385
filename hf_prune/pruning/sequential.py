"""Layer by layer: each weight is pruned on what the already pruned layers before it put out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.batches import Batches, require_batches
from hf_prune.calibration.input_reader import CACHE_BYTES, InputReader
from hf_prune.calibration.output_matching import OutputMatcher
from hf_prune.calibration.sensitivity import Sensitivity, measure_sensitivity
from hf_prune.calibration.statistics import collect_stats
from hf_prune.calibration.trial import NotAlikeError
from hf_prune.criteria.base import GRADIENTS, INPUTS, WeightStats, weight_seed
from hf_prune.kernels.matrix import Target
from hf_prune.kernels.zeroing import zero_removed_
from hf_prune.planning.plan import PlannedTensor, PruningPlan, targets_of
from hf_prune.planning.targets import bias_names
from hf_prune.pruning.compute_masks import compute_masks_synced
from hf_prune.pruning.transaction import WeightBackup
from hf_prune.utils.progress import Bar

_SHELVES = 4  # that share the memory: outputs of blocks, pruned and dense, goals, sensitivities


@torch.no_grad()
def prune_sequentially(
    model: nn.Module,
    plan: PruningPlan,
    calibration: Batches | None,
    old_masks: Mapping[str, Tensor],
    undo: WeightBackup,
    progress: bool = False,
    cache_bytes: int = CACHE_BYTES,
    sensitivity: Sensitivity | None = None,
    given: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Prune a model, in place, so that each target sees the inputs that the pruned model gives it.

    Targets that get the same input (query, key and value) are pruned together. Only one step's statistics are held
    at a time, and no second copy of the weights.

    Args:
        model: The model; its weights are those after pruning when this returns.
        plan: Its plan, of scope row or layer.
        calibration: Batches; read into a list.
        old_masks: Masks of earlier prunings, by parameter name.
        undo: Gets every weight before it changes.
        progress: Show a progress bar.
        cache_bytes: How much of what finished layers put out, and of what the dense model put out, is kept in memory;
            the rest goes to a temporary folder.
        sensitivity: For the objective "loss", if it was measured already.
        given: Masks that are known already, of which only the repair is left.

    Returns:
        Bool masks by parameter name.

    Raises:
        CalibrationError: If batches are missing or unusable.
    """
    batches = list(require_batches(plan.config, calibration))
    attempt = partial(_prune, model, plan, batches, old_masks, undo, progress, cache_bytes, sensitivity, given)
    try:
        return attempt(reuse=True)
    except NotAlikeError:  # what the dense model put out can only be recorded before it is pruned
        undo.restore()
        return attempt(reuse=False)


def _prune(
    model: nn.Module,
    plan: PruningPlan,
    batches: Sequence[Mapping[str, Any]],
    old_masks: Mapping[str, Tensor],
    undo: WeightBackup,
    progress: bool,
    cache_bytes: int,
    sensitivity: Sensitivity | None,
    given: Mapping[str, Tensor] | None,
    *,
    reuse: bool,
) -> dict[str, Tensor]:
    """:func:`prune_sequentially`, whose finished blocks may return what they put out before, or are computed."""
    known: Mapping[str, WeightStats] = {}
    if given is None and (gradients := plan.needs & GRADIENTS):  # taken on the dense model
        dense_config = plan.config.replace(repair=None, objective="layer")
        known = collect_stats(model, dataclasses.replace(plan, config=dense_config), batches, progress)
        assert gradients <= plan.criterion.needs
    parameters = dict(model.named_parameters())
    planned = {t.target.name: t for t in plan.tensors}
    biases = bias_names(model, targets_of(plan)) if plan.config.repair is not None else {}
    masks: dict[str, Tensor] = {}
    if plan.config.objective == "loss":
        cache_bytes //= _SHELVES

    def prune_step(step: list[Target], gathered: dict[str, dict[str, Tensor]], bar: Any) -> None:
        for name in [t.name for t in step]:
            found = gathered.pop(name)
            mask, weights = prune_tensor(model, plan, planned[name], found, old_masks, known.get(name), given, biases)
            for changed in {name, *weights}:
                undo.save(changed, parameters[changed])
            masks[name] = mask
            for changed, values in weights.items():
                parameters[changed].copy_(values)
                if given is not None and changed in given:  # biases of what goes as a whole
                    zero_removed_(parameters[changed], given[changed])
            zero_removed_(parameters[name], mask)
            if name in old_masks:
                zero_removed_(parameters[name], old_masks[name].to(parameters[name].device))
            bar.update()

    with ExitStack() as context:
        reader = context.enter_context(InputReader(model, targets_of(plan), batches, reuse, cache_bytes))
        bar: Bar[object] = context.enter_context(
            Bar(total=len(plan.tensors), desc="Pruning", unit="weight", progress=progress)
        )
        steps = reader.order()
        if plan.config.objective == "layer":
            for step in steps:
                prune_step(step, reader.gather(step, plan.needs & INPUTS), bar)
                reader.finish(step)
            return masks
        if sensitivity is None:
            sensitivity = measure_sensitivity(reader, plan.config.seed, progress, cache_bytes)
            context.callback(sensitivity.close)
        goals = context.enter_context(OutputMatcher(model, targets_of(plan), batches, sensitivity, cache_bytes, reuse))
        for segment in goals.segments(steps):
            for step in segment:
                prune_step(step, goals.gather(reader, step), bar)
                reader.finish(step)
    return masks


def prune_tensor(
    model: nn.Module,
    plan: PruningPlan,
    tensor: PlannedTensor,
    gathered: Mapping[str, Any],
    old_masks: Mapping[str, Tensor],
    known: WeightStats | None = None,
    given: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, str] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mask of one target, and by name its weight and bias where these get new values.

    Args:
        model: The model, which is not changed.
        plan: Its plan.
        tensor: What the plan says of the target.
        gathered: Statistics of what flows into it.
        old_masks: Masks of earlier prunings, by parameter name.
        known: Its other statistics.
        given: Masks that are known already.
        biases: The names of the biases of targets, as of :func:`compute_masks`.
    """
    name = tensor.target.name
    stats = dataclasses.replace(known or WeightStats(seed=weight_seed(plan.config.seed, name)), **gathered)
    part = dataclasses.replace(plan, tensors=(tensor,))
    masks, weights = compute_masks_synced(model, part, {name: stats}, old_masks, given, biases)
    return masks[name], weights
