"""Prune by blocks of the Fisher matrix a model whose weights are read block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing

import torch
from torch import Tensor

from hf_prune.calibration.blockwise_gradients import ExampleLosses
from hf_prune.calibration.descent import Descent, Stage
from hf_prune.calibration.gradients import no_parameter_gradients
from hf_prune.conversion.streaming.global_threshold import global_threshold
from hf_prune.conversion.streaming.lazy_weights import LazyWeights
from hf_prune.conversion.streaming.output import Output
from hf_prune.conversion.streaming.runner import Batches, running
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.kernels.selection import keep_above
from hf_prune.planning.plan import PlannedTensor, PruningPlan
from hf_prune.pruning.compute_masks import keep_units
from hf_prune.pruning.fisher import FisherBlocks
from hf_prune.pruning.fisher_pieces import FISHER_BYTES, BlockSums, Piece, runs
from hf_prune.pruning.selector import spread_units
from hf_prune.utils.offload_cache import OffloadCache


@torch.no_grad()
def find_by_fisher(
    output: Output, plan: PruningPlan, batches: Batches, cache_bytes: int, progress: bool | None = None
) -> PackedMasks:
    """Prune every weight by its blocks of the Fisher matrix, taken on the dense model, one block of it at a time.

    The same as :func:`hf_prune.pruning.fisher.prune_by_fisher`, with rounds for each block of the model in place of
    rounds for all of it. In scope global, scores and blocks of all weights wait on the disk. Weights that an
    interrupted run has pruned are left out.

    Args:
        output: The checkpoint that weights are read from and written to.
        plan: Its plan. Weights are not written if it has a repair, which then finds others for the masks.
        batches: Mappings of model inputs.
        cache_bytes: Most bytes of block outputs that are kept in memory, and again of blocks of the matrix.
        progress: Show a progress bar.

    Returns:
        The masks, if there is a repair.

    Raises:
        CalibrationError: If the batches are unusable.
        PlanError: If the model cannot run block by block.
    """
    masks, scratch = PackedMasks(), output.journal.scratch
    with closing(OffloadCache(cache_bytes, scratch)) as waiting, running(output, batches, cache_bytes) as runner:
        with runner.dense(with_head=True) as lazy:
            blocks = FisherBlocks(plan, lazy.__getitem__, output.previous_masks, waiting)

            def finish(tensor: PlannedTensor, keep: Tensor) -> None:
                name = tensor.target.name
                mask = tensor.target.native(keep)
                if (old := output.previous_masks.get(name)) is not None:
                    mask &= old
                if plan.config.repair is not None:
                    masks[name] = mask
                    blocks.forget(tensor)
                    return
                new = blocks.update(tensor, mask)
                output.write(tensor, lazy[name], mask, {name: new})

            losses = ExampleLosses(runner.reader, plan.config.seed)
            descent = Descent(runner.reader, cache_bytes, scratch, losses.windows, batches)
            with no_parameter_gradients(runner.reader.model):
                for stage in descent.stages(progress, "Pruning"):
                    for piece, fisher in _gathered(output, plan, stage, losses, lazy, cache_bytes):
                        blocks.add(piece, fisher)
                        if piece.is_last and plan.config.scope != "global":
                            tensor, name = piece.tensor, piece.tensor.target.name
                            ((_, keep),) = keep_units(plan, [tensor], {name: blocks.scores(name)})
                            finish(tensor, keep)
            if plan.config.scope == "global":
                sources = [blocks.scores(tensor.target.name) for tensor in plan.tensors]
                threshold, ties = global_threshold(output.journal, plan, sources)
                for tensor, scores, kept in zip(plan.tensors, sources, ties, strict=True):
                    if output.done(tensor.target.name):
                        continue
                    lazy.hold([tensor.target.name])
                    units = keep_above(scores, tensor.units, threshold, kept)
                    finish(tensor, spread_units(plan, tensor.target, units))
    return masks


def _gathered(
    output: Output, plan: PruningPlan, stage: Stage, losses: ExampleLosses, lazy: LazyWeights, cache_bytes: int
) -> Iterator[tuple[Piece, Tensor]]:
    """The pieces of a stage's weights that are not pruned yet with their blocks, whose weights are in the model.

    The examples run through the stage once for each round of pieces, and once if there are none.
    """
    names = {target.name for target in stage.targets if not output.done(target.name)}
    tensors = tuple(tensor for tensor in plan.tensors if tensor.target.name in names)
    rounds = runs(dataclasses.replace(plan, tensors=tensors), max(cache_bytes, FISHER_BYTES))
    for number, pieces in enumerate(rounds, 1):
        weights = lazy.hold_for_gradients(dict.fromkeys(piece.tensor.target.name for piece in pieces))
        sums = BlockSums(pieces, weights)
        for batch, _, gradients in losses.gradients(stage, list(weights.values()), again=number < len(rounds)):
            sums.add(batch, gradients)
        yield from zip(pieces, sums.means(), strict=True)
