"""Prune with calibration data a model whose weights are read block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from hf_prune.calibration.blockwise_gradients import gradients_by_blocks
from hf_prune.calibration.blockwise_sensitivity import measure_by_blocks
from hf_prune.calibration.input_reader import Statistics
from hf_prune.calibration.output_matching import OutputMatcher
from hf_prune.calibration.sensitivity import Sensitivity, measured_batches
from hf_prune.conversion.streaming.lazy_weights import LazyWeights
from hf_prune.conversion.streaming.output import Output
from hf_prune.conversion.streaming.runner import Batches, running
from hf_prune.conversion.streaming.weight_gradients import WeightGradients
from hf_prune.criteria.base import INPUTS
from hf_prune.kernels.matrix import Target
from hf_prune.planning.plan import PlannedTensor, PruningPlan, targets_of
from hf_prune.pruning.learned_allocation import allocate
from hf_prune.pruning.sequential import prune_tensor
from hf_prune.pruning.weight_norm import lengths_name
from hf_prune.utils.progress import Bar


@torch.no_grad()
def prune_blocks(
    output: Output,
    plan: PruningPlan,
    batches: Batches,
    cache_bytes: int,
    sensitivity: Sensitivity | None = None,
    gradients: WeightGradients | None = None,
    fixed_masks: Mapping[str, Tensor] | None = None,
    progress: bool | None = None,
) -> None:
    """Prune targets in the order of their calls, each with inputs from the pruned ones before it.

    The same steps as in :func:`prune_sequentially`, with the weights of one block in memory while statistics are
    gathered, and those of one target while it is pruned. For targets that an earlier run finished, only the outputs of
    their blocks are computed.

    Args:
        output: The checkpoint that weights are read from and written to.
        plan: A plan with scope row or layer.
        batches: Mappings of model inputs.
        cache_bytes: Most bytes of block outputs that are kept in memory; the others go to the folder of the journal.
        sensitivity: How much the predictions depend on the outputs of targets, if planning measured it.
        gradients: Those of the dense model's weights, if the criterion needs them.
        fixed_masks: Masks that are known already, by name, so that only the repair is left to do.
        progress: Show a progress bar.

    Raises:
        CalibrationError: If the batches are unusable.
        PlanError: If the model cannot run block by block.
    """
    planned = {tensor.target.name: tensor for tensor in plan.tensors}
    with ExitStack() as resources:
        by_loss = plan.config.objective == "loss"
        if by_loss and sensitivity is None:
            sensitivity = _measured(output, plan, batches, cache_bytes, progress)
            resources.callback(sensitivity.close)
        runner = resources.enter_context(running(output, batches, cache_bytes))
        reader = runner.reader
        lazy = resources.enter_context(runner.weights())
        gather: Gather = partial(reader.gather, needs=plan.needs & INPUTS)
        segments: Iterable[list[list[Target]]] = [runner.steps]
        if by_loss:
            assert sensitivity is not None
            lazy.release()
            with runner.reading_dense():
                matcher = OutputMatcher(
                    reader.model, targets_of(plan), runner.batches, sensitivity, cache_bytes, True,
                    output.journal.scratch,
                )  # fmt: skip
            resources.enter_context(matcher)
            gather = partial(matcher.gather, reader)
            segments = runner.recorded(lazy, matcher.segments(runner.steps))
        bar: Bar[object] = resources.enter_context(
            Bar(total=len(plan.tensors), desc="Pruning", unit="weight", progress=progress)
        )
        for segment in segments:
            for step in segment:
                lazy.release()
                reader.advance()
                remaining = [planned[target.name] for target in step if not output.done(target.name)]
                bar.update(len(step) - len(remaining))
                for tensor in _prune_step(output, plan, gather, lazy, remaining, gradients, fixed_masks):
                    bar.note(tensor.target.module)
                    bar.update()
                reader.finish(step)


@torch.no_grad()
def learned_sparsities(
    output: Output, batches: Batches, cache_bytes: int, progress: bool | None = None
) -> tuple[dict[str, float], Sensitivity | None]:
    """The sparsity of every target by an allocation that is learned from the dense model, block by block.

    Args:
        output: With a plan whose sparsities are unknown yet. Its journal keeps what is found, for a run that goes on.
        batches: Mappings of model inputs.
        cache_bytes: Most bytes of block outputs that are kept in memory.
        progress: Show a progress bar.

    Returns:
        Sparsities by name, and the sensitivity if it was measured on the way; to be closed.

    Raises:
        CalibrationError: If the batches are unusable.
        PlanError: If the model cannot run block by block.
    """
    plan, folder = output.plan, output.journal.scratch
    for record in output.journal.records:
        if "sparsities" in record:
            return record["sparsities"], None
    some = list(batches)
    if plan.config.allocation != "owl":
        some = measured_batches(output.meta_model.model, batches)
    with running(output, some, cache_bytes) as runner, runner.dense(with_head=True):
        reader = runner.reader
        measure = partial(measure_by_blocks, reader, plan.config.seed, progress, cache_bytes, folder)
        sparsities, sensitivity = allocate(reader, runner.steps, plan, measure, output.previous_masks, output.read)
    if sensitivity is not None and len(some) < len(batches):
        sensitivity.forget_tokens()
    output.journal.add({"sparsities": sparsities})
    return sparsities, sensitivity


def _measured(
    output: Output, plan: PruningPlan, batches: Batches, cache_bytes: int, progress: bool | None
) -> Sensitivity:
    """How much the predictions of the dense model depend on the outputs of targets, on those batches that count."""
    some = measured_batches(output.meta_model.model, batches)
    with running(output, some, cache_bytes) as runner, runner.dense(with_head=True):
        folder = output.journal.scratch
        sensitivity = measure_by_blocks(runner.reader, plan.config.seed, progress, cache_bytes, folder)
        runner.reader.tokens.clear()
    if len(some) < len(batches):
        sensitivity.forget_tokens()
    return sensitivity


@torch.no_grad()
def measure_gradients(
    output: Output, plan: PruningPlan, batches: Batches, cache_bytes: int, progress: bool | None = None
) -> WeightGradients:
    """The gradients that a criterion needs, of all weights of the dense model, one block at a time.

    Args:
        output: The checkpoint that weights are read from.
        plan: Its plan.
        batches: Mappings of model inputs, with labels if the criterion needs them.
        cache_bytes: Most bytes of block outputs that are kept in memory.
        progress: Show a progress bar.

    Raises:
        CalibrationError: If the batches are unusable.
        PlanError: If the model cannot run block by block.
    """
    gradients = WeightGradients(plan, output.journal.scratch)
    try:
        with running(output, batches, cache_bytes) as runner, runner.dense(with_head=True) as lazy:
            gradients.fill(
                gradients_by_blocks(
                    runner.reader, batches, gradients.needs, plan.config.seed, lazy.hold_for_gradients, progress,
                    cache_bytes, output.journal.scratch,
                )
            )  # fmt: skip
    except BaseException:
        gradients.close()
        raise
    return gradients


Gather = Callable[[Sequence[Target]], Statistics]


def _prune_step(
    output: Output,
    plan: PruningPlan,
    gather: Gather,
    lazy: LazyWeights,
    step: Sequence[PlannedTensor],
    gradients: WeightGradients | None,
    fixed_masks: Mapping[str, Tensor] | None,
) -> list[PlannedTensor]:
    """Gather the statistics of targets that share a pass over the batches, and prune them one by one."""
    if not step:
        return []
    gathered = gather([tensor.target for tensor in step])
    for tensor in step:
        name = tensor.target.name
        beside = (output.biases.get(name), lengths_name(name))
        lazy.hold([name, *(other for other in beside if other is not None)])
        stats = None if gradients is None else gradients.stats(name)
        mask, new = prune_tensor(
            lazy.model, plan, tensor, gathered.pop(name), output.previous_masks, stats, fixed_masks, output.biases
        )
        output.write(tensor, lazy[name], mask, new)
    lazy.release()
    return list(step)
