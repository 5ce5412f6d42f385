"""From scores to masks: what a plan and its criterion leave of every weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_prune.criteria.base import INPUTS, WeightStats
from hf_prune.distributed import all_or_none, from_first
from hf_prune.errors import CalibrationError
from hf_prune.granularities.base import Granularity
from hf_prune.plan import PlannedTensor, PruningPlan
from hf_prune.repair import corrected, refit
from hf_prune.selection import CHUNK, Chunks, keep_highest, keep_highest_per_row
from hf_prune.targets import Target, bias_names, is_finite
from hf_prune.units import block_sums, spread_blocks

_LEAST_SHARE = 1e-6  # of the mean weight of outputs that the predictions hardly depend on


def agreed_masks(
    model: nn.Module,
    plan: PruningPlan,
    stats: Mapping[str, WeightStats],
    old_masks: Mapping[str, Tensor],
    given: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """:func:`compute_masks`, and of several processes that calibrate together each gets what the first one computed.

    The statistics are the same in all of them, but nothing promises that two machines round an eigenvalue alike; masks
    that differ would never be noticed. Without calibration processes need not wait for one another.
    """
    if not plan.needs:
        return compute_masks(model, plan, stats, old_masks, given, biases=biases)
    with all_or_none():
        found = compute_masks(model, plan, stats, old_masks, given, biases=biases)
    masks, weights = ({name: from_first(tensor) for name, tensor in tensors.items()} for tensors in found)
    return masks, weights


@torch.no_grad()
def compute_masks(
    model: nn.Module,
    plan: PruningPlan,
    stats: Mapping[str, WeightStats],
    old_masks: Mapping[str, Tensor],
    given: Mapping[str, Tensor] | None = None,
    whole: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The masks that a plan leads to, without touching the model.

    Args:
        model: The model.
        plan: Its plan.
        stats: What calibration gathered.
        old_masks: Masks of earlier prunings, by parameter name.
        given: Masks that are known already, of which only the repair is left.
        whole: The weights by name, where the model does not hold them whole.
        biases: What :func:`bias_names` says, if it was asked: it walks through the whole model.

    Returns:
        Bool masks, and the weights and biases that the criterion or the repair gave new values, both in the
        parameters' own layouts, by name.
    """
    parameter = model.get_parameter if whole is None else whole.__getitem__  # often of one target among thousands
    criterion, granularity = plan.criterion, plan.granularity
    if biases is None:
        biases = bias_names(model, [t.target for t in plan.tensors]) if plan.config.repair is not None else {}

    def matrix(target: Target) -> Tensor:
        return target.matrix(parameter(target.name).detach())

    def old_matrix(target: Target) -> Tensor | None:
        old = old_masks.get(target.name)
        return None if old is None else target.matrix(old)

    def source(target: Target, weight: Tensor) -> Chunks:
        return lambda: unit_chunks(plan, target, weight, stats[target.name], old_matrix(target))

    masks: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    if plan.config.scope == "global" and given is None:
        sources = {t.target.name: source(t.target, matrix(t.target)) for t in plan.tensors}
        return {t.target.name: t.target.native(keep) for t, keep in keep_units(plan, plan.tensors, sources)}, weights
    for tensor in plan.tensors:
        target = tensor.target
        name, repaired = target.name, None
        stat, dense, old = stats[name], matrix(target), old_matrix(target)
        weight, scale = _goal(dense, stat) if criterion.needs & INPUTS else (dense, None)
        if given is not None:
            keep = target.matrix(given[name])
        elif criterion.repairs:
            select = Selector(criterion.name, tensor, granularity, old)
            keep, repaired = criterion.prune_weight(weight, stat, select)
            repaired = repaired if scale is None else repaired / scale
        else:
            ((_, keep),) = keep_units(plan, [tensor], {name: source(target, weight)})
        if plan.config.repair is not None:
            assert stat.input_gram is not None
            bias = biases.get(name)
            repaired, new_bias = refit(
                dense,
                keep if old is None else keep & old.to(keep.device),
                stat.input_gram,
                stat.input_mean,
                None if bias is None else parameter(bias).detach(),
                stat.output_change,
                stat.change_products,
                start=repaired,
            )
            if bias is not None and new_bias is not None:
                weights[bias] = new_bias.to(parameter(bias).dtype)
        masks[name] = target.native(keep)
        if repaired is not None:
            if not is_finite(repaired):
                raise CalibrationError(
                    f"the repaired weights of {name} are not finite: calibrate in float32 or bfloat16, and check the "
                    f"batches"
                )
            weights[name] = target.native(repaired.to(matrix(target).dtype))
    return masks, weights


def _goal(weight: Tensor, stats: WeightStats) -> tuple[Tensor, Tensor | None]:
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
        weight = corrected(
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
        sources: Scores of units by parameter name, see :data:`~hf_prune.selection.Chunks`.

    Yields:
        Each tensor with its (out, in) bool matrix, True = keep.
    """
    if plan.config.scope == "global":
        parts = [sources[tensor.target.name] for tensor in tensors]
        kept = iter(keep_highest(parts, [tensor.units for tensor in tensors], plan.remove))
    else:
        kept = (_select(tensor, sources[tensor.target.name]) for tensor in tensors)
    for tensor, units in zip(tensors, kept, strict=True):
        yield tensor, spread_units(plan, tensor.target, units)


def unit_chunks(
    plan: PruningPlan, target: Target, weight: Tensor, stats: WeightStats, old: Tensor | None
) -> Iterator[Tensor]:
    """Scores of one weight's units, in order, a few rows at a time where the criterion allows it.

    Args:
        plan: Its plan.
        target: Which weight it is.
        weight: (out, in).
        stats: What is known of it.
        old: (out, in) bool mask of earlier prunings, or None.
    """
    criterion, block = plan.criterion, plan.granularity.block_in(target.matrix_shape)
    step = len(weight)
    if criterion.rowwise:
        step = max(1, CHUNK // (weight.shape[1] * block[0])) * block[0]
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        scores = criterion.scores(weight[rows], stats.rows(rows))
        yield checked_units(scores, block, None if old is None else old[rows], criterion.name, target.name)


def spread_units(plan: PruningPlan, target: Target, keep: Tensor) -> Tensor:
    """(units,) bool -> (out, in) bool."""
    granularity, shape = plan.granularity, target.matrix_shape
    return spread_blocks(keep.view(granularity.units(shape)), granularity.block_in(shape))


@dataclass(frozen=True)
class Selector:
    """The :class:`~hf_prune.criteria.base.Select` of one weight.

    Args:
        criterion: The criterion's name, for messages.
        tensor: What the plan says of the weight.
        granularity: What is removed together.
        old: (out, in) bool mask of earlier prunings, or None.
    """

    criterion: str
    tensor: PlannedTensor
    granularity: Granularity
    old: Tensor | None = None

    @property
    def width(self) -> int:
        """How many neighbouring columns are decided together."""
        return self.granularity.pool or self.block[1]

    @property
    def block(self) -> tuple[int, int]:
        """(outputs, inputs) of one unit."""
        return self.granularity.block_in(self.tensor.target.matrix_shape)

    @property
    def pools(self) -> bool:
        """Whether every ``width`` columns have a count of their own."""
        return self.granularity.pool is not None

    def __call__(self, scores: Tensor) -> Tensor:
        """(out, in) scores -> (out, in) bool, True = keep."""
        units = self._units(scores, self.old)
        return self._spread(_select(self.tensor, lambda: [units]).view(units.shape), 0)

    def columns(self, scores: Tensor, start: int) -> Tensor:
        """(out, columns) scores of columns ``start`` and following -> (out, columns) bool."""
        stop = start + scores.shape[1]
        units = self._units(scores, None if self.old is None else self.old[:, start:stop])
        assert self.tensor.remove is not None
        pools = self.tensor.units // self.tensor.pool
        per_pool = self.tensor.remove // pools
        if self.pools:
            return self._spread(keep_highest_per_row(units.reshape(-1, self.width), per_pool).view(units.shape), start)
        lines = 1 if pools == 1 else len(units)  # a pool is the whole matrix, or a row of it
        left = self._left(units.device).view(lines, -1, self.tensor.units // len(units))
        first, last = start // self.width, stop // self.width
        alive = left.sum((1, 2))  # (lines,)
        extra = (per_pool - (left[0].numel() - alive)).clamp_min(0)  # still to go, beyond what earlier prunings removed
        before = [left[:, :, :end].sum((1, 2)) for end in (first, last)]
        shares = [(2 * extra * n + alive) // (2 * alive).clamp_min(1) for n in before]  # rounded, and exact at the end
        here = left[:, :, first:last]
        count = shares[1] - shares[0] + here[0].numel() - here.sum((1, 2))
        flat = units.reshape(lines, -1)
        if lines == 1:
            return self._spread(keep_highest([lambda: [flat]], [flat.numel()], int(count))[0].view(units.shape), start)
        rank = flat.argsort(dim=1, stable=True).argsort(dim=1)
        return self._spread((rank >= count[:, None]).view(units.shape), start)

    def _left(self, device: torch.device) -> Tensor:
        """Bool, one per unit: whether earlier prunings left anything of it."""
        shape = self.granularity.units(self.tensor.target.matrix_shape)
        if self.old is None:
            return torch.ones(shape, dtype=torch.bool, device=device)
        return _alive(self.old.to(device), self.block)

    def _units(self, scores: Tensor, old: Tensor | None) -> Tensor:
        return checked_units(scores, self.block, old, self.criterion, self.tensor.target.name)

    def _spread(self, keep: Tensor, start: int) -> Tensor:
        """One decision per unit -> one per weight, of columns ``start`` and following; what is gone stays gone."""
        mask = spread_blocks(keep, self.block)
        if self.old is None:
            return mask
        return mask & self.old[:, start : start + mask.shape[1]].to(mask.device)


def checked_units(scores: Tensor, block: tuple[int, int], old: Tensor | None, criterion: str, name: str) -> Tensor:
    """:func:`unit_scores` of scores that are finite."""
    if not is_finite(scores):
        raise CalibrationError(
            f"criterion {criterion!r} gave scores that are not finite for {name}: check the calibration data"
        )
    return unit_scores(scores, block, old)


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
    sums = block_sums(scores.masked_fill(~left, 0), block)
    return sums.masked_fill(~_alive(left, block), float("-inf")).contiguous()


def _alive(old: Tensor, block: tuple[int, int]) -> Tensor:
    """Bool, one per unit: whether a mask of earlier prunings left anything of it."""
    return block_sums(old.float(), block) > 0
