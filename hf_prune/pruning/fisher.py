"""Blocks of the Fisher matrix: gathered some outputs at a time, and what is pruned by them.

Blocks of B neighbouring weights take B numbers for each weight: all of them together would take many times the memory
of the model. So the batches run through it several times, each time for as many outputs as a budget allows, and what
was found waits in a temporary folder until the mask is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.batches import Batches
from hf_prune.calibration.gradients import differentiable, example_gradients
from hf_prune.criteria.base import WeightStats, derived_seed
from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import is_finite
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.kernels.selection import Chunks
from hf_prune.planning.plan import PlannedTensor, PruningPlan
from hf_prune.pruning.compute_masks import keep_units
from hf_prune.pruning.fisher_pieces import FISHER_BYTES, BlockSums, Piece, runs
from hf_prune.pruning.run import CalibrationRun
from hf_prune.pruning.selector import checked_units
from hf_prune.utils.distributed import broadcast, fail_together
from hf_prune.utils.offload_cache import OffloadCache


def gather_blocks(
    model: nn.Module, pieces: Sequence[Piece], batches: Batches, seed: int = 0, progress: bool | None = None
) -> Iterator[Tensor]:
    """Blocks of the Fisher matrix of some outputs, from one run of the batches.

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
    sums = BlockSums(pieces, {name: parameters[name] for name in names})
    with differentiable(model, names), fail_together():
        for number, gradients in example_gradients(model, names, batches, seed, progress):
            sums.add(number, gradients)
    yield from sums.means()


class FisherBlocks:
    """The scores of weights by their blocks of the Fisher matrix, and the blocks themselves, which wait for the mask.

    Args:
        plan: The plan.
        parameter: Gives weights by name.
        previous_masks: Masks of earlier prunings, by parameter name.
        waiting: Where they wait.
    """

    def __init__(
        self,
        plan: PruningPlan,
        parameter: Callable[[str], Tensor],
        previous_masks: Mapping[str, Tensor],
        waiting: OffloadCache,
    ) -> None:
        self._plan, self._parameter, self._previous_masks, self._waiting = plan, parameter, previous_masks, waiting
        self._pieces: dict[str, list[Piece]] = {tensor.target.name: [] for tensor in plan.tensors}

    def add(self, piece: Piece, fisher: Tensor) -> None:
        """Compute the scores of a piece, and keep them and its blocks.

        Args:
            piece: The next outputs of a weight.
            fisher: (outputs, blocks, size, size); changed in place.

        Raises:
            CalibrationError: If scores are not finite.
        """
        target, criterion = piece.tensor.target, self._plan.criterion
        old = self._previous_masks.get(target.name)
        if old is not None:
            old = target.matrix(old)[piece.rows]
            _decouple(fisher, old)
        weight = target.matrix(self._parameter(target.name))[piece.rows]
        scores = criterion.scores(weight, self._stats(piece, fisher))
        block = self._plan.granularity.block_in(target.slab_shape)
        units = checked_units(scores, block, old, criterion.name, target.name)
        self._waiting.put(("scores", target.name, piece.start), units)
        self._waiting.put((target.name, piece.start), fisher)
        self._pieces[target.name].append(piece)

    def scores(self, name: str) -> Chunks:
        """The scores of the units of a weight."""
        return lambda: (self._waiting.get(("scores", name, piece.start)) for piece in self._pieces[name])

    def update(self, tensor: PlannedTensor, mask: Tensor) -> Tensor:
        """The values that a weight gets under a mask; its blocks are gone then.

        Raises:
            CalibrationError: If they are not finite.
        """
        target, name, parts = tensor.target, tensor.target.name, []
        weight, keep = target.matrix(self._parameter(name)), target.matrix(mask)
        for piece in self._pieces[name]:
            stats = self._stats(piece, self._waiting.pop((name, piece.start)))
            parts.append(self._plan.criterion.update(weight[piece.rows], keep[piece.rows], stats))
        self.forget(tensor)
        if not all(map(is_finite, parts)):
            raise CalibrationError(
                f"the repaired weights of {name} are not finite: calibrate in float32 or bfloat16, and check the "
                f"batches"
            )
        return target.native(torch.cat(parts))

    def forget(self, tensor: PlannedTensor) -> None:
        """Drop the scores and blocks of a weight."""
        name = tensor.target.name
        for piece in self._pieces[name]:
            for key in (("scores", name, piece.start), (name, piece.start)):
                if key in self._waiting:
                    self._waiting.pop(key)
        self._pieces[name].clear()

    def _stats(self, piece: Piece, fisher: Tensor) -> WeightStats:
        target = piece.tensor.target
        columns = self._plan.granularity.block_in(target.slab_shape)[1]
        return WeightStats(seed=derived_seed(self._plan.config.seed, target.name), fisher=fisher, columns=columns)


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
    waiting = OffloadCache(cache_bytes)
    blocks = FisherBlocks(plan, dict(model.named_parameters()).__getitem__, previous_masks, waiting)
    masks = PackedMasks()

    def finish(tensors: Sequence[PlannedTensor]) -> None:
        with fail_together():
            sources = {t.target.name: blocks.scores(t.target.name) for t in tensors}
            kept = {t.target.name: t.target.native(keep) for t, keep in keep_units(plan, tensors, sources)}
        for tensor in tensors:
            name = tensor.target.name
            mask = broadcast(kept.pop(name))
            if name in previous_masks:
                mask &= previous_masks[name].to(mask.device)
            masks[name] = mask
            with fail_together():
                weight = blocks.update(tensor, mask)
            weights.put(name, broadcast(weight))

    try:
        for pieces in runs(plan, max(cache_bytes, FISHER_BYTES)):
            gathered = gather_blocks(model, pieces, run.data, plan.config.seed, run.progress)
            for piece, fisher in zip(pieces, gathered, strict=True):
                with fail_together():
                    blocks.add(piece, fisher)
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
