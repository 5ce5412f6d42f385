"""From scores to masks: what a plan and its criterion leave of every weight."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hf_prune.criteria.base import WeightStats
from hf_prune.errors import CalibrationError
from hf_prune.plan import PlannedTensor, PruningPlan
from hf_prune.selection import CHUNK, Chunks, keep_highest, keep_highest_per_row
from hf_prune.targets import Target, is_finite
from hf_prune.units import block_sums, spread_blocks


@torch.no_grad()
def compute_masks(
    model: nn.Module, plan: PruningPlan, stats: Mapping[str, WeightStats], old_masks: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The masks that a plan leads to, without touching the model.

    Args:
        model: The model.
        plan: Its plan.
        stats: What calibration gathered.
        old_masks: Masks of earlier prunings, by parameter name.

    Returns:
        Bool masks, and the weights that the criterion repaired, both in the parameters' own layouts, by name.
    """
    parameters = dict(model.named_parameters())
    criterion, granularity = plan.criterion, plan.granularity
    block = granularity.block

    def matrix(target: Target) -> Tensor:
        return target.matrix(parameters[target.name].detach())

    def old_matrix(target: Target) -> Tensor | None:
        old = old_masks.get(target.name)
        return None if old is None else target.matrix(old)

    def units(target: Target, scores: Tensor, old: Tensor | None) -> Tensor:
        if not is_finite(scores):
            raise CalibrationError(
                f"criterion {criterion.name!r} gave scores that are not finite for {target.name}: "
                f"check the calibration data"
            )
        return unit_scores(scores, block, old)

    def chunks(target: Target) -> Iterator[Tensor]:
        weight, old = matrix(target), old_matrix(target)
        step = len(weight)
        if criterion.rowwise:
            step = max(1, CHUNK // (weight.shape[1] * block[0])) * block[0]
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            scores = criterion.scores(weight[rows], stats[target.name].rows(rows))
            yield units(target, scores, None if old is None else old[rows])

    def spread(target: Target, keep: Tensor) -> Tensor:
        return spread_blocks(keep.view(granularity.units(target.matrix_shape)), block)

    sources = {tensor.target.name: functools.partial(chunks, tensor.target) for tensor in plan.tensors}
    masks: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    if plan.config.scope == "global":
        kept = keep_highest(list(sources.values()), [tensor.units for tensor in plan.tensors], plan.remove)
        masks = {t.target.name: t.target.native(spread(t.target, k)) for t, k in zip(plan.tensors, kept, strict=True)}
        return masks, weights
    for tensor in plan.tensors:
        target = tensor.target
        if criterion.repairs:

            def choose(scores: Tensor, tensor: PlannedTensor = tensor) -> Tensor:
                whole = units(tensor.target, scores, old_matrix(tensor.target))
                return spread(tensor.target, _select(tensor, lambda: [whole]))

            keep, weight = criterion.prune_weight(matrix(target), stats[target.name], choose)
            masks[target.name], weights[target.name] = target.native(keep), target.native(weight)
        else:
            masks[target.name] = target.native(spread(target, _select(tensor, sources[target.name])))
    return masks, weights


def _select(tensor: PlannedTensor, scores: Chunks) -> Tensor:
    """(units,) bool: which units of one tensor stay, by the pools of its plan."""
    assert tensor.remove is not None
    pools = tensor.units // tensor.pool
    if pools == 1:
        return keep_highest([scores], [tensor.units], tensor.remove)[0]
    per_pool = tensor.remove // pools
    return torch.cat([keep_highest_per_row(c.reshape(-1, tensor.pool), per_pool).reshape(-1) for c in scores()])


def unit_scores(scores: Tensor, block: tuple[int, int], old: Tensor | None) -> Tensor:
    """Scores of units from scores of weights; what earlier prunings removed ranks below everything.

    Args:
        scores: (out, in) float32.
        block: (outputs, inputs) of one unit.
        old: (out, in) bool mask of earlier prunings, or None.

    Returns:
        (out / rows, in / columns) float32, -inf where nothing of the unit is left.
    """
    if old is None:
        return block_sums(scores, block).contiguous()
    left = old.to(scores.device)
    gone = block_sums(left.float(), block) == 0
    return block_sums(scores.masked_fill(~left, 0), block).masked_fill(gone, float("-inf")).contiguous()
