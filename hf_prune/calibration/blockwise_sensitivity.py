"""Sensitivities of a model whose weights are read block by block: the gradient is carried down from block to block.

All batches run through one block before they run through the next, and what each block returns is kept on the disk.
Then the gradient of the predictions enters at the top, and each block, from the last to the first, runs once more on
what it got, with gradients, and hands on what its own inputs are worth. So no more than the weights of one block, and
what it computes for one window of text, are in memory. The model calls its blocks itself, with those before the block
of interest replayed, as in :mod:`~hf_prune.calibration.replay`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_prune.calibration.batches import small_batches, without_labels
from hf_prune.calibration.block_sequence import BlockSequence
from hf_prune.calibration.gradients import no_parameter_gradients
from hf_prune.calibration.hooks import Stop, Watcher
from hf_prune.calibration.input_reader import InputReader
from hf_prune.calibration.output_head import HeadFinder, OutputHead, join_windows
from hf_prune.calibration.sensitivity import (
    OutputGradients,
    Sensitivity,
    run_backwards,
)
from hf_prune.criteria.base import derived_seed
from hf_prune.errors import PlanError
from hf_prune.kernels.matrix import Target
from hf_prune.utils.forward import batch_to_device
from hf_prune.utils.offload_cache import OffloadCache
from hf_prune.utils.progress import Bar


def measure_by_blocks(
    reader: InputReader,
    seed: int,
    progress: bool | None = None,
    cache_bytes: int = 0,
    folder: str | os.PathLike[str] | None = None,
) -> Sensitivity:
    """What :func:`~hf_prune.calibration.sensitivity.measure_sensitivity` measures, one block at a time.

    Args:
        reader: Has the model, the targets and the batches, inside its context, and knows their order; no target is
            finished.
        seed: Seed of random labels and directions.
        progress: Show a progress bar.
        cache_bytes: How much of what blocks return is kept in memory, and again of the sensitivities.
        folder: Where the rest goes; None for the system's temporary folder.

    Raises:
        PlanError: If the model is no single sequence of blocks, each of which reads what the one before it returned.
        CalibrationError: If a gradient is not finite, or the predictions depend on no target.
    """
    sequence, outside = _sequence(reader)
    blocks = sequence.blocks
    sensitivity = Sensitivity(cache_bytes, folder)
    gradients = OutputGradients(reader)
    borders = _Borders(reader, sequence, OffloadCache(cache_bytes, folder))
    inside = [[t for t in reader.targets if reader.block_of(t.name) is block] for block in blocks]
    lowest = next((number for number, targets in enumerate(inside) if targets), len(blocks))
    bar: Bar[object] = Bar(total=2 * len(blocks) + 1 - lowest, desc="Sensitivity", unit="block", progress=progress)
    try:
        with no_parameter_gradients(reader.model), bar:
            for number in range(len(blocks)):
                for index, parts in enumerate(_batches(reader)):
                    for part, window in enumerate(parts):
                        borders.record(number, (index, part), window)
                bar.update()
            with _watching(reader, outside, gradients):
                seen = itertools.chain(*(reader.holders[t.name] for t in outside))
                find_head = HeadFinder(reader.model, reader.forward, seen)
                for index, parts in enumerate(_batches(reader)):
                    generator = torch.Generator().manual_seed(derived_seed(seed, index))
                    calls = []
                    for part, window in enumerate(parts):
                        head = find_head(window)
                        gradients.start()
                        borders.from_top((index, part), window, head, generator)
                        calls.append(gradients.stop())
                    _keep(sensitivity, index, calls)
            bar.update()
            for number in reversed(range(lowest, len(blocks))):
                with _watching(reader, inside[number], gradients):
                    for index, parts in enumerate(_batches(reader)):
                        calls = []
                        for part, window in enumerate(parts):
                            gradients.start()
                            borders.down(number, (index, part), window)
                            calls.append(gradients.stop())
                        _keep(sensitivity, index, calls)
                bar.update()
            gradients.hand_on(sensitivity)
    except BaseException:
        sensitivity.close()
        raise
    finally:
        borders.outputs.close()
    return sensitivity


def _sequence(reader: InputReader) -> tuple[BlockSequence, list[Target]]:
    """The one sequence of a model, and the targets after it."""
    sequences = reader.replay.sequences
    what = f"gradients of {type(reader.model).__name__} cannot be carried down from block to block"
    how = "choose objective 'layer' and another allocation, or prune without streaming"
    if len(sequences) != 1 or not set(reader.kinds) <= sequences[0].kinds:
        raise PlanError(f"{what}: found {len(sequences)} lists of blocks, expected one that every batch uses; {how}")
    sequence = sequences[0]
    if not all(reader.replay.check(sequence)):
        raise PlanError(f"{what}, since some of them read more than what the one before returned; {how}")
    outside = [t for t in reader.targets if reader.block_of(t.name) is None]
    if early := [t.name for t in outside if t.name in sequence.first_use]:
        raise PlanError(f"{what}, since {early[0]} is used before the last block returns; {how}, or leave it out")
    return sequence, outside


def _batches(reader: InputReader) -> Iterator[list[dict[str, Any]]]:
    """The batches, each as the windows that run one after the other."""
    for batch in reader.batches:
        inputs = batch_to_device(reader.model, batch, reader.device)
        yield small_batches(reader.model, without_labels(reader.model, inputs))


def _keep(sensitivity: Sensitivity, index: int, calls: list[dict[str, list[Tensor]]]) -> None:
    for name, of_calls in join_windows(calls).items():
        sensitivity.add_tokens(name, index, of_calls)


@contextmanager
def _watching(reader: InputReader, targets: Iterable[Target], gradients: OutputGradients) -> Iterator[None]:
    """Inside, the gradients at the outputs of some targets are read."""
    with ExitStack() as hooks:
        for t in targets:
            for module in reader.holders[t.name]:
                Watcher(module, gradients.hook(t), after=True).install(hooks, None)
        yield


class _Borders:
    """What blocks return for each window, which becomes the gradients of that on the way down.

    Args:
        reader: Runs the model.
        sequence: The blocks.
        outputs: Keeps it, by the number of the block and the window.
    """

    def __init__(self, reader: InputReader, sequence: BlockSequence, outputs: OffloadCache) -> None:
        self._reader, self._sequence, self.outputs = reader, sequence, outputs

    @torch.no_grad()
    def record(self, number: int, key: Hashable, window: Mapping[str, Any]) -> None:
        """Run a block on what the one before it returned."""
        self.outputs.put((number, key), self._run(number, window, lambda: self.outputs.get((number - 1, key))))

    def from_top(
        self, key: Hashable, window: Mapping[str, Any], head: OutputHead | None, generator: torch.Generator
    ) -> None:
        """Run what comes after the last block, and take the gradient of the predictions."""
        last = len(self._sequence.blocks) - 1
        leaves, output = self._leaves(last, key)
        with self._sequence.replaying(last + 1, output):
            run_backwards(self._reader, window, head, generator)
        self.outputs.put((last, key), [leaf.grad for leaf in leaves])

    def down(self, number: int, key: Hashable, window: Mapping[str, Any]) -> None:
        """Run a block with gradients, from those of what it returns to those of what the one before it returned."""
        leaves, output = self._leaves(number - 1, key) if number else ([], None)
        with torch.enable_grad():
            returned = _floating(self._run(number, window, output))
        above = zip(returned, self.outputs.pop((number, key)), strict=True)
        pairs = [(value, gradient) for value, gradient in above if gradient is not None and value.requires_grad]
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])
        if number:
            self.outputs.put((number - 1, key), [leaf.grad for leaf in leaves])

    def _leaves(self, number: int, key: Hashable) -> tuple[list[Tensor], Callable[[], Any]]:
        """What a block returned, as tensors that get gradients, and a function that gives it to the model."""
        values, spec = tree_flatten(self.outputs.get((number, key)))
        leaves = [value.requires_grad_() for value in _floating(values)]

        def output() -> Any:  # copies, which the model may change in place
            return tree_unflatten([v.clone() if isinstance(v, Tensor) else v for v in values], spec)

        return leaves, output

    def _run(self, number: int, window: Mapping[str, Any], output: Callable[[], Any] | None) -> Any:
        """What a block returns when the one before it returns something that is known."""
        returned: list[Any] = []

        def keep(module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
            returned.append(value)
            raise Stop

        block = self._sequence.blocks[number]
        with ExitStack() as context:
            Watcher(block, keep, after=True).install(context, None)
            if number and output is not None:
                context.enter_context(self._sequence.replaying(number, output))
            with suppress(Stop):
                self._reader.forward(window)
        if not returned:
            raise PlanError(
                f"{type(self._reader.model).__name__} does not run its blocks alike for every batch, so gradients "
                f"cannot be carried down from block to block: prune without streaming"
            )
        return returned[0]


def _floating(value: Any) -> list[Tensor]:
    return [x for x in tree_flatten(value)[0] if isinstance(x, Tensor) and x.is_floating_point()]
