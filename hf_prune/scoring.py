"""From scores to masks: what a plan and its criterion leave of every weight."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_prune.criteria.base import WeightStats
from hf_prune.distributed import all_or_none, from_first
from hf_prune.errors import CalibrationError
from hf_prune.granularities.base import Granularity
from hf_prune.plan import PlannedTensor, PruningPlan
from hf_prune.repair import damped, least_squares
from hf_prune.selection import CHUNK, Chunks, keep_highest, keep_highest_per_row
from hf_prune.targets import Target, is_finite
from hf_prune.units import block_sums, spread_blocks


def agreed_masks(
    model: nn.Module, plan: PruningPlan, stats: Mapping[str, WeightStats], old_masks: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """:func:`compute_masks`, and of several processes that calibrate together each gets what the first one computed.

    The statistics are the same in all of them, but nothing promises that two machines round an eigenvalue alike; masks
    that differ would never be noticed. Without calibration processes need not wait for one another.
    """
    if not plan.needs:
        return compute_masks(model, plan, stats, old_masks)
    with all_or_none():
        found = compute_masks(model, plan, stats, old_masks)
    masks, weights = ({name: from_first(tensor) for name, tensor in tensors.items()} for tensors in found)
    return masks, weights


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

    def matrix(target: Target) -> Tensor:
        return target.matrix(parameters[target.name].detach())

    def old_matrix(target: Target) -> Tensor | None:
        old = old_masks.get(target.name)
        return None if old is None else target.matrix(old)

    def chunks(target: Target) -> Iterator[Tensor]:
        return unit_chunks(plan, target, matrix(target), stats[target.name], old_matrix(target))

    def spread(target: Target, keep: Tensor) -> Tensor:
        return spread_units(plan, target, keep)

    sources = {tensor.target.name: functools.partial(chunks, tensor.target) for tensor in plan.tensors}
    masks: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    if plan.config.scope == "global":
        kept = keep_highest(list(sources.values()), [tensor.units for tensor in plan.tensors], plan.remove)
        masks = {t.target.name: t.target.native(spread(t.target, k)) for t, k in zip(plan.tensors, kept, strict=True)}
        return masks, weights
    for tensor in plan.tensors:
        target = tensor.target
        name, repaired = target.name, None
        if criterion.repairs:
            select = Selector(criterion.name, tensor, granularity, old_matrix(target))
            keep, repaired = criterion.prune_weight(matrix(target), stats[name], select)
        else:
            keep = spread(target, _select(tensor, sources[name]))
        if plan.config.repair is not None:
            gram, old = stats[name].input_gram, old_matrix(target)
            assert gram is not None
            support = keep if old is None else keep & old
            gram = damped(gram.to(torch.promote_types(matrix(target).dtype, torch.float32)))
            repaired = least_squares(matrix(target), support, gram, start=repaired)
        masks[name] = target.native(keep)
        if repaired is not None:
            if not is_finite(repaired):
                raise CalibrationError(
                    f"the repaired weights of {name} are not finite: calibrate in float32 or bfloat16, and check the "
                    f"batches"
                )
            weights[name] = target.native(repaired.to(matrix(target).dtype))
    return masks, weights


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
    criterion, block = plan.criterion, plan.granularity.block
    step = len(weight)
    if criterion.rowwise:
        step = max(1, CHUNK // (weight.shape[1] * block[0])) * block[0]
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        scores = criterion.scores(weight[rows], stats.rows(rows))
        yield _checked_units(scores, block, None if old is None else old[rows], criterion.name, target.name)


def spread_units(plan: PruningPlan, target: Target, keep: Tensor) -> Tensor:
    """(units,) bool -> (out, in) bool."""
    granularity = plan.granularity
    return spread_blocks(keep.view(granularity.units(target.matrix_shape)), granularity.block)


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
        return self.granularity.pool or self.granularity.block[1]

    @property
    def pools(self) -> bool:
        """Whether every ``width`` columns have a count of their own."""
        return self.granularity.pool is not None

    def __call__(self, scores: Tensor) -> Tensor:
        """(out, in) scores -> (out, in) bool, True = keep."""
        units = self._units(scores, self.old)
        return self._spread(_select(self.tensor, lambda: [units]).view(units.shape))

    def columns(self, scores: Tensor, start: int) -> Tensor:
        """(out, columns) scores of columns ``start`` and following -> (out, columns) bool."""
        stop = start + scores.shape[1]
        units = self._units(scores, None if self.old is None else self.old[:, start:stop])
        assert self.tensor.remove is not None
        pools = self.tensor.units // self.tensor.pool
        per_pool = self.tensor.remove // pools
        if self.pools:
            return self._spread(keep_highest_per_row(units.reshape(-1, self.width), per_pool).view(units.shape))
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
            return self._spread(keep_highest([lambda: [flat]], [flat.numel()], int(count))[0].view(units.shape))
        rank = flat.argsort(dim=1, stable=True).argsort(dim=1)
        return self._spread((rank >= count[:, None]).view(units.shape))

    def _left(self, device: torch.device) -> Tensor:
        """Bool, one per unit: whether earlier prunings left anything of it."""
        shape = self.granularity.units(self.tensor.target.matrix_shape)
        if self.old is None:
            return torch.ones(shape, dtype=torch.bool, device=device)
        return _alive(self.old.to(device), self.granularity.block)

    def _units(self, scores: Tensor, old: Tensor | None) -> Tensor:
        return _checked_units(scores, self.granularity.block, old, self.criterion, self.tensor.target.name)

    def _spread(self, keep: Tensor) -> Tensor:
        return spread_blocks(keep, self.granularity.block)


def _checked_units(scores: Tensor, block: tuple[int, int], old: Tensor | None, criterion: str, name: str) -> Tensor:
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
