"""From scores to masks: what a plan and its criterion leave of every weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hf_prune.criteria.base import INPUTS, Criterion, WeightStats
from hf_prune.errors import CalibrationError
from hf_prune.kernels.least_squares import refit, with_output_correction
from hf_prune.kernels.matrix import Target, is_finite
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.kernels.selection import CHUNK, Chunks, keep_highest
from hf_prune.planning.plan import PlannedTensor, PruningPlan
from hf_prune.planning.targets import bias_names
from hf_prune.pruning.selector import Selector, checked_units, select_units, spread_units
from hf_prune.pruning.weight_norm import effective_weight, keeps_values, largest_of_slices, lengths_left
from hf_prune.utils.distributed import broadcast, fail_together
from hf_prune.utils.offloaded_weights import weight_of

_LAST = 1e30  # a score above all others, small enough to be added up
_LEAST_SHARE = 1e-6  # of the mean weight of outputs that the predictions hardly depend on


def compute_masks_synced(
    model: nn.Module,
    plan: PruningPlan,
    stats: Mapping[str, WeightStats],
    previous_masks: Mapping[str, Tensor],
    fixed_masks: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, str] | None = None,
) -> tuple[PackedMasks, dict[str, Tensor]]:
    """:func:`compute_masks`, and of several processes that calibrate together each gets what the first one computed.

    The statistics are the same in all of them, but nothing promises that two machines round an eigenvalue alike; masks
    that differ would never be noticed. Without calibration processes need not wait for one another.
    """
    if not plan.needs:
        return compute_masks(model, plan, stats, previous_masks, fixed_masks, biases=biases)
    with fail_together():
        masks, weights = compute_masks(model, plan, stats, previous_masks, fixed_masks, biases=biases)
    agreed = {name: dataclasses.replace(mask, bits=broadcast(mask.bits)) for name, mask in masks.packed.items()}
    return PackedMasks.sharing(agreed), {name: broadcast(weight) for name, weight in weights.items()}


@torch.no_grad()
def compute_masks(
    model: nn.Module,
    plan: PruningPlan,
    stats: Mapping[str, WeightStats],
    previous_masks: Mapping[str, Tensor],
    fixed_masks: Mapping[str, Tensor] | None = None,
    whole: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, str] | None = None,
) -> tuple[PackedMasks, dict[str, Tensor]]:
    """The masks that a plan leads to, without touching the model.

    Args:
        model: The model.
        plan: Its plan.
        stats: What calibration gathered.
        previous_masks: Masks of earlier prunings, by parameter name.
        fixed_masks: Masks that are known already, so that only the repair is left.
        whole: The weights, and their lengths under weight norm, by name, where the model does not hold them whole.
        biases: What :func:`bias_names` says, if it was asked: it walks through the whole model.

    Returns:
        Bool masks, and the weights and biases that the criterion or the repair gave new values, and the lengths that
        weight norm gives what is left, all in the parameters' own layouts, by name.
    """
    parameter = partial(weight_of, model) if whole is None else whole.__getitem__  # often of one target of thousands
    criterion, granularity = plan.criterion, plan.granularity
    if biases is None:
        biases = bias_names(model, [t.target for t in plan.tensors]) if plan.config.repair is not None else {}

    def matrix(target: Target) -> Tensor:
        by_value = keeps_values(plan)
        return target.matrix(effective_weight(target.name, parameter) if by_value else parameter(target.name).detach())

    def old_matrix(target: Target, weight: Tensor) -> Tensor | None:
        old = previous_masks.get(target.name)
        return None if old is None else target.matrix(old).to(weight.device)

    def at_home(name: str, tensor: Tensor) -> Tensor:
        return tensor.cpu() if whole is None and model.get_parameter(name).is_meta else tensor

    def source(target: Target, weight: Tensor | None = None) -> Chunks:
        def chunks() -> Iterator[Tensor]:  # offloaded weights are read each time, so that one is in memory at a time
            kept = largest_of_slices(model, target, parameter(target.name).detach())
            dense = matrix(target) if weight is None else weight
            return unit_chunks(plan, target, dense, stats[target.name], old_matrix(target, dense), kept)

        return chunks

    masks = PackedMasks()
    weights: dict[str, Tensor] = {}

    if plan.config.scope == "global" and fixed_masks is None:
        sources = {t.target.name: source(t.target) for t in plan.tensors}
        for t, keep in keep_units(plan, plan.tensors, sources):
            masks[t.target.name] = at_home(t.target.name, t.target.native(keep))
        for name, mask in masks.items():
            weights |= lengths_left(plan, name, mask, previous_masks, parameter)
        return masks, weights
    for tensor in plan.tensors:
        target, name = tensor.target, tensor.target.name
        dense = matrix(target)
        old = old_matrix(target, dense)
        slabs = _slabs(tensor, dense, old, stats[name], criterion)
        repaired: list[Tensor | None] = [None] * len(slabs)
        if fixed_masks is not None:
            keep = target.matrix(fixed_masks[name])
        elif criterion.repairs:
            kept = []
            for number, slab in enumerate(slabs):
                select = Selector(criterion.name, slab.tensor, granularity, slab.old)
                slab_keep, weight = criterion.prune_weight(slab.weight, slab.stats, select)
                kept.append(slab_keep)
                repaired[number] = weight if slab.scale is None else weight / slab.scale
            keep = torch.cat(kept)
        else:
            weight = dense if slabs[0].scale is None else torch.cat([slab.weight for slab in slabs])
            ((_, keep),) = keep_units(plan, [tensor], {name: source(target, weight)})
        if plan.config.repair is not None:
            bias = biases.get(name)
            old_bias = None if bias is None else parameter(bias).detach()
            new_biases = []
            for number, slab in enumerate(slabs):
                rows = target.rows(number)
                assert slab.stats.input_gram is not None
                repaired[number], new_bias = refit(
                    slab.dense,
                    keep[rows] if slab.old is None else keep[rows] & slab.old.to(keep.device),
                    slab.stats.input_gram,
                    slab.stats.input_mean,
                    None if old_bias is None else old_bias.reshape(-1)[rows],
                    slab.stats.output_change,
                    slab.stats.change_products,
                    start=repaired[number],
                )
                if new_bias is not None:
                    new_biases.append(new_bias)
            if bias is not None and old_bias is not None and new_biases:
                weights[bias] = torch.cat(new_biases).reshape(old_bias.shape).to(old_bias.dtype)
        weights |= lengths_left(plan, name, target.native(keep), previous_masks, parameter)
        masks[name] = at_home(name, target.native(keep))
        if changed := [weight for weight in repaired if weight is not None]:
            if not all(map(is_finite, changed)):
                raise CalibrationError(
                    f"the repaired weights of {name} are not finite: calibrate in float32 or bfloat16, and check the "
                    f"batches"
                )
            weights[name] = at_home(name, target.native(torch.cat(changed).to(dense.dtype)))
    return masks, weights


@dataclass(frozen=True)
class _Slab:
    """One of the matrices of a weight, as a criterion sees it.

    Args:
        tensor: What the plan says of it.
        dense: (out, in).
        weight: What the criterion gets in its place, see :func:`loss_aware_weight`.
        scale: (out, 1), by which that is scaled; None if it is not.
        stats: Its statistics.
        old: (out, in) bool mask of earlier prunings, or None.
    """

    tensor: PlannedTensor
    dense: Tensor
    weight: Tensor
    scale: Tensor | None
    stats: WeightStats
    old: Tensor | None


def _slabs(
    tensor: PlannedTensor, dense: Tensor, old: Tensor | None, stats: WeightStats, criterion: Criterion
) -> list[_Slab]:
    """The matrices of a weight one by one: most weights have a single one."""
    target, slabs = tensor.target, []
    for number in range(target.slabs):
        part, rows, stat = tensor, target.rows(number), stats
        if target.slabs > 1:
            part, stat = tensor.slab(number), stats.slab(number, rows)
        matrix = dense[rows]
        weight, scale = loss_aware_weight(matrix, stat) if criterion.needs & INPUTS else (matrix, None)
        slabs.append(_Slab(part, matrix, weight, scale, stat, None if old is None else old[rows]))
    return slabs


def loss_aware_weight(weight: Tensor, stats: WeightStats) -> tuple[Tensor, Tensor | None]:
    """The weights that a criterion gets in place of the dense ones, for the objective "loss".

    They make up for what the outputs lack, and each output is scaled by the root of how much the predictions depend on
    it, so that errors in all of them are alike.

    Args:
        weight: (out, in) dense.
        stats: Its statistics.

    Returns:
        (out, in) weights, and the (out, 1) scale; the dense weights and None for the objective "layer".
    """
    if stats.output_weight is None:
        return weight, None
    if stats.change_products is not None:
        assert stats.input_gram is not None
        weight = with_output_correction(
            weight.to(torch.promote_types(weight.dtype, torch.float32)), stats.input_gram, stats.change_products
        )
    mean = stats.output_weight.mean()
    share = (stats.output_weight / mean).clamp_min(_LEAST_SHARE) if mean > 0 else torch.ones_like(stats.output_weight)
    scale = share.sqrt()[:, None].to(weight.device)
    return weight * scale, scale


def keep_units(
    plan: PruningPlan, tensors: Sequence[PlannedTensor], sources: Mapping[str, Chunks]
) -> Iterator[tuple[PlannedTensor, Tensor]]:
    """What stays of some tensors, given the scores of their units: exactly what the plan asks for.

    Args:
        plan: The plan.
        tensors: Those of the plan that are decided: in global scope, all of them.
        sources: Scores of units by parameter name, see :data:`~hf_prune.kernels.selection.Chunks`.

    Yields:
        Each tensor with its (out, in) bool matrix, True = keep.
    """
    if plan.config.scope == "global":
        parts = [sources[tensor.target.name] for tensor in tensors]
        kept = iter(keep_highest(parts, [tensor.units for tensor in tensors], plan.remove))
    else:
        kept = (select_units(tensor, sources[tensor.target.name]) for tensor in tensors)
    for tensor, units in zip(tensors, kept, strict=True):
        yield tensor, spread_units(plan, tensor.target, units)


def unit_chunks(
    plan: PruningPlan,
    target: Target,
    weight: Tensor,
    stats: WeightStats,
    old: Tensor | None,
    last: Tensor | None = None,
) -> Iterator[Tensor]:
    """Scores of one weight's units, in order, a few rows at a time where the criterion allows it.

    Args:
        plan: Its plan.
        target: Which weight it is.
        weight: (out, in).
        stats: What is known of it.
        old: (out, in) bool mask of earlier prunings, or None.
        last: (out, in) bool, True for weights that go after all others, or None.
    """
    criterion, block = plan.criterion, plan.granularity.block_in(target.slab_shape)
    apart = criterion.needs & INPUTS or not criterion.rowwise
    for number in range(target.slabs if apart else 1):
        slab, first, length = stats, 0, len(weight)
        if apart and target.slabs > 1:
            outputs = target.rows(number)
            slab, first, length = stats.slab(number, outputs), outputs.start, outputs.stop - outputs.start
        step = length
        if criterion.rowwise:
            step = max(1, CHUNK // (weight.shape[1] * block[0])) * block[0]
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            here = slice(first + rows.start, first + rows.stop)
            scores = criterion.scores(weight[here], slab.rows(rows))
            scores = scores if last is None else scores.masked_fill(last[here], _LAST)
            yield checked_units(scores, block, None if old is None else old[here], criterion.name, target.name)
