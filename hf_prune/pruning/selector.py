"""Select which units of a weight stay, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_prune.errors import CalibrationError
from hf_prune.granularities.base import Granularity
from hf_prune.kernels.blocks import block_sums, spread_blocks
from hf_prune.kernels.matrix import Target, is_finite
from hf_prune.kernels.selection import Chunks, keep_highest, keep_highest_per_row
from hf_prune.planning.plan import PlannedTensor, PruningPlan


def spread_units(plan: PruningPlan, target: Target, keep: Tensor) -> Tensor:
    """(units,) bool -> (out, in) bool."""
    granularity = plan.granularity
    return spread_blocks(keep.view(granularity.grid(target)), granularity.block_in(target.slab_shape))


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
        return self.granularity.block_in(self.tensor.target.slab_shape)

    @property
    def pools(self) -> bool:
        """Whether every ``width`` columns have a count of their own."""
        return self.granularity.pool is not None

    def __call__(self, scores: Tensor) -> Tensor:
        """(out, in) scores -> (out, in) bool, True = keep."""
        units = self._units(scores, self.old)
        return self._spread(select_units(self.tensor, lambda: [units]).view(units.shape), 0)

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
        remaining = self._left(units.device).view(lines, -1, self.tensor.units // len(units))
        first, last = start // self.width, stop // self.width
        alive = remaining.sum((1, 2))  # (lines,)
        # Still to be removed, beyond what earlier prunings removed.
        extra = (per_pool - (remaining[0].numel() - alive)).clamp_min(0)
        before = [remaining[:, :, :end].sum((1, 2)) for end in (first, last)]
        shares = [(2 * extra * n + alive) // (2 * alive).clamp_min(1) for n in before]  # rounded, and exact at the end
        here = remaining[:, :, first:last]
        count = shares[1] - shares[0] + here[0].numel() - here.sum((1, 2))
        flat = units.reshape(lines, -1)
        if lines == 1:
            return self._spread(keep_highest([lambda: [flat]], [flat.numel()], int(count))[0].view(units.shape), start)
        rank = flat.argsort(dim=1, stable=True).argsort(dim=1)
        return self._spread((rank >= count[:, None]).view(units.shape), start)

    def _left(self, device: torch.device) -> Tensor:
        """Bool, one per unit: whether earlier prunings left anything of it."""
        shape = self.granularity.grid(self.tensor.target)
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


def select_units(tensor: PlannedTensor, scores: Chunks) -> Tensor:
    """(units,) bool: which units of one tensor stay, by the pools of its plan."""
    assert tensor.remove is not None
    if tensor.by_slab:
        parts = enumerate(regroup(scores(), tensor.units // tensor.target.slabs))
        return torch.cat([select_units(tensor.slab(number), partial(iter, [part])) for number, part in parts])
    pools = tensor.units // tensor.pool
    if pools == 1:
        return keep_highest([scores], [tensor.units], tensor.remove)[0]
    per_pool = tensor.remove // pools
    if tensor.pool == tensor.units // tensor.target.slabs:
        each = regroup(scores(), tensor.pool)
        return torch.cat([keep_highest([partial(iter, [part])], [tensor.pool], per_pool)[0] for part in each])
    return torch.cat([keep_highest_per_row(c.reshape(-1, tensor.pool), per_pool).reshape(-1) for c in scores()])


def regroup(chunks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Chunks of any shape as flat tensors of one size: the scores of one expert at a time."""
    waiting: list[Tensor] = []
    count = 0
    for chunk in chunks:
        flat = chunk.reshape(-1)
        while count + len(flat) >= size:
            yield torch.cat([*waiting, flat[: size - count]])
            flat = flat[size - count :]
            waiting, count = [], 0
        if len(flat):
            waiting.append(flat)
            count += len(flat)


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
    previous = old.to(scores.device)
    sums = block_sums(scores.masked_fill(~previous, 0), block)
    return sums.masked_fill(~_alive(previous, block), float("-inf")).contiguous()


def _alive(old: Tensor, block: tuple[int, int]) -> Tensor:
    """Bool, one per unit: whether a mask of earlier prunings left anything of it."""
    return block_sums(old.float(), block) > 0
