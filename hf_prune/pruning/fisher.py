"""Blocks of the Fisher matrix: gathered some outputs at a time, and what is pruned by them.

Blocks of B neighbouring weights take B numbers for each weight: all of them together would take many times the memory
of the model. So the batches run through it several times, each time for as many outputs as a budget allows, and what
was found waits in a temporary folder until the mask is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.accumulators import accumulate_dtype
from hf_prune.calibration.batches import Batches
from hf_prune.calibration.gradients import differentiable, example_gradients, mean_over_examples
from hf_prune.criteria.base import FISHER_BLOCK, WeightStats, derived_seed
from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import is_finite
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.planning.plan import PlannedTensor, PruningPlan
from hf_prune.pruning.compute_masks import keep_units
from hf_prune.pruning.run import CalibrationRun
from hf_prune.pruning.selector import checked_units
from hf_prune.utils.distributed import broadcast, fail_together
from hf_prune.utils.offload_cache import OffloadCache

FISHER_BYTES = 2**29  # of sums that are gathered in one run of the batches
_TOGETHER = 16  # examples whose gradients are multiplied at a time
_PRODUCTS = 256  # blocks that are multiplied at a time


@dataclass(frozen=True)
class Piece:
    """Some outputs of one weight.

    Args:
        tensor: What the plan says of the weight.
        start: The first output.
        stop: One past the last.
        size: Weights of a block.
    """

    tensor: PlannedTensor
    start: int
    stop: int
    size: int

    @property
    def rows(self) -> slice:
        """The outputs, as an index."""
        return slice(self.start, self.stop)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of its blocks: (outputs, blocks, size, size)."""
        blocks = math.ceil(self.tensor.target.matrix_shape[1] / self.size)
        return self.stop - self.start, blocks, self.size, self.size

    @property
    def is_last(self) -> bool:
        """Whether no output of the weight comes after it."""
        return self.stop == self.tensor.target.matrix_shape[0]


def block_size(inputs: int, width: int = 1) -> int:
    """How many neighbouring inputs share a block: at most 50 as in the paper, and equally many in nearly every block.

    Args:
        inputs: Of the weight.
        width: Neighbours that must share one; if that is more than 50, they alone do.

    Returns:
        A multiple of ``width``. The last block is smaller where it does not divide ``inputs``.

    Example:
        >>> block_size(384), block_size(1536), block_size(384, width=4)
        (48, 50, 48)
    """
    units = inputs // width
    blocks = math.ceil(units / max(1, FISHER_BLOCK // width))
    return width * math.ceil(units / blocks)


def runs(plan: PruningPlan, budget: int = FISHER_BYTES) -> list[list[Piece]]:
    """What is gathered in each run of the batches, in the order of the model.

    Args:
        plan: The plan.
        budget: Bytes of sums that a run may hold; it holds one row of units at least.
    """
    piece_runs: list[list[Piece]] = [[]]
    remaining = budget
    for tensor in plan.tensors:
        out, inputs = tensor.target.matrix_shape
        height, width = plan.granularity.block_in(tensor.target.slab_shape)
        width = plan.granularity.pool or width
        size = block_size(inputs, width)
        cost = height * math.ceil(inputs / size) * size**2 * torch.float64.itemsize
        start = 0
        while start < out:
            outputs = min(out - start, remaining // cost * height)
            if outputs == 0 and piece_runs[-1]:  # full
                piece_runs.append([])
                remaining = budget
                continue
            outputs = max(outputs, height)
            piece_runs[-1].append(Piece(tensor, start, start + outputs, size))
            start += outputs
            remaining = max(0, remaining - outputs // height * cost)
    return piece_runs


def gather_blocks(
    model: nn.Module, pieces: Sequence[Piece], batches: Batches, seed: int = 0, progress: bool | None = None
) -> Iterator[Tensor]:
    """Blocks of the Fisher matrix of some outputs, from one run of the batches.

    Products of up to 16 examples of a batch are computed in float32; see :func:`accumulate_dtype` for
    the rest.

    Args:
        model: The model; its weights, gradients and modes are as before afterwards.
        pieces: Which outputs.
        batches: See :func:`hf_prune.calibration.gradients.example_gradients`.
        seed: Seed of what is drawn.
        progress: Show a progress bar.

    Yields:
        For each piece (outputs, blocks, size, size), float32, of the gradients' mean ggᵀ.

    Raises:
        CalibrationError: If there are no batches, or a prediction or a gradient is not finite.
    """
    parameters = dict(model.named_parameters())
    names = list(dict.fromkeys(piece.tensor.target.name for piece in pieces))
    device = parameters[names[0]].device
    sums = [
        torch.zeros(p.shape, dtype=accumulate_dtype(device), device=parameters[p.tensor.target.name].device)
        for p in pieces
    ]
    examples, batch = 0, -1
    together: list[tuple[Tensor | None, ...]] = []
    with differentiable(model, names), fail_together():
        for number, gradients in example_gradients(model, names, batches, seed, progress):
            if number != batch or len(together) == _TOGETHER:
                _add(sums, pieces, names, together)
                together.clear()
            together.append(gradients)
            examples, batch = examples + 1, number
        _add(sums, pieces, names, together)
    sums.reverse()
    for piece in pieces:
        name = piece.tensor.target.name
        yield mean_over_examples({name: sums.pop()}, examples)[name]


def _add(
    sums: Sequence[Tensor], pieces: Sequence[Piece], names: Sequence[str], examples: Sequence[tuple[Tensor | None, ...]]
) -> None:
    """Add the products of some examples' gradients."""
    places = {name: place for place, name in enumerate(names)}
    for total, piece in zip(sums, pieces, strict=True):
        target, place = piece.tensor.target, places[piece.tensor.target.name]
        rows = [target.matrix(g)[piece.rows].float() for each in examples if (g := each[place]) is not None]
        if not rows:
            continue
        outputs, blocks, size, _ = piece.shape
        every = torch.nn.functional.pad(torch.stack(rows), (0, blocks * size - target.matrix_shape[1]))
        every = every.view(len(rows), outputs * blocks, size).transpose(0, 1)  # (outputs * blocks, examples, size)
        for part, gradients in zip(total.flatten(0, 1).split(_PRODUCTS), every.split(_PRODUCTS), strict=True):
            part.add_(gradients.mT @ gradients)


@torch.no_grad()
def prune_by_fisher(
    run: CalibrationRun[Any], plan: PruningPlan, previous_masks: Mapping[str, Tensor], weights: OffloadCache
) -> PackedMasks:
    """The masks and weights that a criterion finds with blocks of the Fisher matrix; the model is not changed.

    Args:
        run: The model and the batches, which are read once for each round. Its memory budget says how much of the
            blocks stays in memory until the mask is known; a round gathers as much, or 512 MiB if that is more.
        plan: What is pruned now: the plan of the run, or of one step.
        previous_masks: Masks of earlier prunings and steps, by parameter name.
        weights: Gets the new values of the weights, by parameter name.

    Returns:
        Bool masks by parameter name.

    Raises:
        CalibrationError: If batches are unusable.
    """
    model, cache_bytes = run.model, run.memory.single
    parameters = dict(model.named_parameters())
    criterion, granularity = plan.criterion, plan.granularity
    waiting = OffloadCache(cache_bytes)
    scores: dict[str, list[Tensor]] = {tensor.target.name: [] for tensor in plan.tensors}
    pieces_of: dict[str, list[Piece]] = {tensor.target.name: [] for tensor in plan.tensors}
    masks = PackedMasks()

    def part(piece: Piece, tensors: Mapping[str, Tensor]) -> Tensor:
        target = piece.tensor.target
        return target.matrix(tensors[target.name])[piece.rows]

    def stats(piece: Piece, fisher: Tensor) -> WeightStats:
        target = piece.tensor.target
        columns = granularity.block_in(target.slab_shape)[1]
        return WeightStats(seed=derived_seed(plan.config.seed, target.name), fisher=fisher, columns=columns)

    def score(piece: Piece, fisher: Tensor) -> None:
        name = piece.tensor.target.name
        old = part(piece, previous_masks) if name in previous_masks else None
        if old is not None:
            _decouple(fisher, old)
        weight_scores = criterion.scores(part(piece, parameters), stats(piece, fisher))
        block = granularity.block_in(piece.tensor.target.slab_shape)
        scores[name].append(checked_units(weight_scores, block, old, criterion.name, name))
        waiting.put((name, piece.start), fisher)
        pieces_of[name].append(piece)

    def finish(tensors: Sequence[PlannedTensor]) -> None:
        with fail_together():
            sources = {t.target.name: partial(iter, scores[t.target.name]) for t in tensors}
            kept = {t.target.name: t.target.native(keep) for t, keep in keep_units(plan, tensors, sources)}
        for tensor in tensors:
            name = tensor.target.name
            mask = broadcast(kept.pop(name))
            if name in previous_masks:
                mask &= previous_masks[name].to(mask.device)
            masks[name] = mask
            with fail_together():
                parts = []
                for piece in pieces_of[name]:
                    fisher = waiting.pop((name, piece.start))
                    parts.append(
                        criterion.update(part(piece, parameters), part(piece, {name: mask}), stats(piece, fisher))
                    )
                weight = torch.cat(parts)
                if not is_finite(weight):
                    raise CalibrationError(
                        f"the repaired weights of {name} are not finite: calibrate in float32 or bfloat16, and check "
                        f"the batches"
                    )
            weights.put(name, broadcast(tensor.target.native(weight)))
            scores[name].clear()

    try:
        for pieces in runs(plan, max(cache_bytes, FISHER_BYTES)):
            gathered = gather_blocks(model, pieces, run.data, plan.config.seed, run.progress)
            for piece, fisher in zip(pieces, gathered, strict=True):
                with fail_together():
                    score(piece, fisher)
                if piece.is_last and plan.config.scope != "global":
                    finish([piece.tensor])
        if plan.config.scope == "global":
            finish(plan.tensors)
    finally:
        waiting.close()
    return masks


def _decouple(fisher: Tensor, keep: Tensor) -> None:
    """Take what earlier prunings removed out of the blocks, in place: those weights stay zero whatever others do."""
    outputs, blocks, size, _ = fisher.shape
    kept = torch.nn.functional.pad(keep.to(fisher), (0, blocks * size - keep.shape[1])).view(outputs, blocks, size)
    fisher.mul_(kept.unsqueeze(-1)).mul_(kept.unsqueeze(-2))
