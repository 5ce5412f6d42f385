"""Layer by layer: each weight is pruned on what the already pruned layers before it put out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_prune.activations import Batches, InputReader
from hf_prune.calibration import collect_stats, require_batches, weight_seed
from hf_prune.criteria.base import GRADIENTS, INPUTS, WeightStats
from hf_prune.masking import zero_removed_
from hf_prune.plan import PruningPlan
from hf_prune.scoring import agreed_masks


@torch.no_grad()
def prune_in_order(
    model: nn.Module,
    plan: PruningPlan,
    calibration: Batches | None,
    old_masks: Mapping[str, Tensor],
    progress: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The masks that a plan leads to if each target sees the inputs that the pruned model gives it.

    Targets that get the same input (query, key and value) are pruned together. While this runs, the model holds
    pruned weights; whatever happens, it has its own again afterwards. Only one step's statistics are held at a time.

    Args:
        model: The model.
        plan: Its plan, of scope row or layer.
        calibration: Batches; read into a list.
        old_masks: Masks of earlier prunings, by parameter name.
        progress: Show a progress bar.

    Returns:
        Bool masks, and the weights that the criterion or the repair changed, as of
        :func:`~hf_prune.scoring.compute_masks`.

    Raises:
        CalibrationError: If batches are missing or unusable.
    """
    batches = list(require_batches(plan, calibration))
    known: Mapping[str, WeightStats] = {}
    if gradients := plan.needs & GRADIENTS:  # taken on the dense model
        dense_config = plan.config.replace(repair=None)
        known = collect_stats(model, dataclasses.replace(plan, config=dense_config), batches, progress)
        assert gradients <= plan.criterion.needs
    parameters = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    hidden = None if progress else True  # None: shown on a terminal
    try:
        with InputReader(model, plan, batches) as reader:
            steps = reader.order()
            with tqdm(total=len(plan.tensors), desc="Pruning", unit="weight", leave=False, disable=hidden) as bar:
                for step in steps:
                    gathered = reader.gather(step, plan.needs & INPUTS)
                    for tensor in step:
                        name = tensor.target.name
                        stats = known.get(name, WeightStats(seed=weight_seed(plan, name)))
                        found = gathered.pop(name)
                        stats = dataclasses.replace(
                            stats, input_gram=found.get("input_gram"), input_norm=found.get("input_norm")
                        )
                        part = dataclasses.replace(plan, tensors=(tensor,))
                        mask, weight = agreed_masks(model, part, {name: stats}, old_masks)
                        masks |= mask
                        dense[name] = parameters[name].detach().clone()
                        if name in weight:
                            parameters[name].copy_(weight[name])
                        zero_removed_(parameters[name], masks[name])
                        if name in old_masks:
                            zero_removed_(parameters[name], old_masks[name].to(parameters[name].device))
                        if name in weight:
                            weights[name] = parameters[name].detach().clone()
                        bar.update()
                    reader.finish(step)
    finally:
        for name, weight_before in dense.items():
            parameters[name].copy_(weight_before)
    return masks, weights
