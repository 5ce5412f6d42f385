"""Prune with calibration data a model whose weights are read block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from hf_prune.calibration.batches import without_labels
from hf_prune.calibration.blockwise_gradients import gradients_by_blocks
from hf_prune.calibration.blockwise_sensitivity import measure_by_blocks
from hf_prune.calibration.input_reader import InputReader, Statistics
from hf_prune.calibration.output_matching import OutputMatcher
from hf_prune.calibration.sensitivity import Sensitivity, measured_batches
from hf_prune.calibration.trial import NotAlikeError
from hf_prune.conversion.streaming.lazy_weights import LazyWeights
from hf_prune.conversion.streaming.meta_model import explaining_meta_errors
from hf_prune.conversion.streaming.output import Output
from hf_prune.conversion.streaming.weight_gradients import WeightGradients
from hf_prune.criteria.base import INPUTS
from hf_prune.errors import PlanError
from hf_prune.kernels.matrix import Target
from hf_prune.planning.plan import PlannedTensor, PruningPlan, targets_of
from hf_prune.pruning.learned_allocation import allocate
from hf_prune.pruning.sequential import prune_tensor
from hf_prune.pruning.weight_norm import lengths_name
from hf_prune.utils.forward import is_encoder_decoder
from hf_prune.utils.progress import Bar

Batches = Sequence[Mapping[str, Any]]


@torch.no_grad()
def prune_blocks(
    output: Output,
    plan: PruningPlan,
    batches: Batches,
    cache_bytes: int,
    sensitivity: Sensitivity | None = None,
    gradients: WeightGradients | None = None,
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
        runner = resources.enter_context(_running(output, batches, cache_bytes))
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
                for tensor in _prune_step(output, plan, gather, lazy, remaining, gradients):
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
    with _running(output, some, cache_bytes) as runner, runner.dense(with_head=True):
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
    with _running(output, some, cache_bytes) as runner, runner.dense(with_head=True):
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
        with _running(output, batches, cache_bytes) as runner, runner.dense(with_head=True) as lazy:
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


class _Runner:
    """A model that runs with weights that are read when they are used.

    Args:
        output: Where they are read from.
        batches: Mappings of model inputs.
        cache_bytes: Most bytes of block outputs that are kept in memory.

    Attributes:
        reader: Runs the model, inside a context of weights.
        steps: The targets in the order of their calls.
    """

    def __init__(self, output: Output, batches: Batches, cache_bytes: int) -> None:
        self._output = output
        model = output.meta_model.model
        # An encoder-decoder makes decoder inputs from labels; other models only compute a loss from them.
        self._needs_labels = is_encoder_decoder(model)
        self.batches = list(batches)
        if not self._needs_labels:
            self.batches = [without_labels(model, b) if isinstance(b, Mapping) else b for b in self.batches]
        output.meta_model.load_buffers()
        targets = targets_of(output.plan)
        self.reader = InputReader(
            model, targets, self.batches, cache_bytes=cache_bytes, folder=output.journal.scratch
        )  # fmt: skip
        self.steps: list[list[Target]] = []

    @contextmanager
    def weights(self, with_head: bool = False) -> Iterator[LazyWeights]:
        """The weights are read inside.

        Args:
            with_head: Whether predictions are looked at; otherwise an output embedding that is not pruned is skipped.
        """
        skip = not self._needs_labels and not with_head
        output = self._output
        with LazyWeights(output.meta_model, output.read, output.read_rows, output.targets, skip) as lazy:
            if not self.steps:
                self.steps = self.reader.order()
            yield lazy

    @contextmanager
    def reading_dense(self) -> Iterator[None]:
        """Weights are read as the source has them inside, also where an interrupted run has pruned them."""
        self._output.reads_dense = True
        try:
            yield
        finally:
            self._output.reads_dense = False

    @contextmanager
    def dense(self, with_head: bool = False) -> Iterator[LazyWeights]:
        """The weights of the source are read inside."""
        with self.reading_dense(), self.weights(with_head) as lazy:
            yield lazy

    def recorded(self, lazy: LazyWeights, segments: Iterator[list[list[Target]]]) -> Iterator[list[list[Target]]]:
        """Segments of which each is recorded with the weights of the source."""
        while True:
            lazy.release()
            with self.reading_dense():
                segment = next(segments, None)
            lazy.release()
            if segment is None:
                return
            yield segment


@contextmanager
def _running(output: Output, batches: Batches, cache_bytes: int) -> Iterator[_Runner]:
    """A model that runs inside with weights that are read when they are used; explains what it cannot do that way."""
    model = output.meta_model.model
    runner = _Runner(output, batches, cache_bytes)
    try:
        with explaining_meta_errors(model), runner.reader:
            yield runner
    except NotAlikeError as error:
        raise PlanError(
            f"{type(model).__name__} does not run its blocks alike for every batch, so its dense outputs cannot be "
            f"recorded block by block: choose objective 'layer', or prune without streaming"
        ) from error


def _prune_step(
    output: Output,
    plan: PruningPlan,
    gather: Gather,
    lazy: LazyWeights,
    step: Sequence[PlannedTensor],
    gradients: WeightGradients | None,
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
            lazy.model, plan, tensor, gathered.pop(name), output.previous_masks, stats, None, output.biases
        )
        output.write(tensor, lazy[name], mask, new)
    lazy.release()
    return list(step)
