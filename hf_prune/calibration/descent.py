"""Gradients of a model whose weights are read block by block: they are carried down from block to block.

All batches run through one block before they run through the next, and what each block returns is kept on the disk.
Then the gradient of something that is computed at the top enters there, and each block, from the last to the first,
runs once more on what it got, with gradients, and hands on what its own inputs are worth. So no more than the weights
of one block, and what it computes for one window of text, are in memory. The model calls its blocks itself, with those
before the block of interest replayed, as in :mod:`~hf_prune.calibration.replay`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_prune.calibration.batches import small_batches, without_labels
from hf_prune.calibration.block_sequence import BlockSequence
from hf_prune.calibration.hooks import Stop, Watcher
from hf_prune.calibration.input_reader import InputReader
from hf_prune.errors import PlanError
from hf_prune.kernels.matrix import Target
from hf_prune.utils.forward import batch_to_device
from hf_prune.utils.offload_cache import OffloadCache
from hf_prune.utils.progress import Bar

Window = Mapping[str, Any]
"""Model inputs that run at once."""


@dataclass(frozen=True)
class Call:
    """One window of a batch, which runs through one stage of a :class:`Descent`.

    Args:
        part: Its number in the batch.
        window: The model inputs.
        run: Runs it forwards and backwards. It takes a function that runs the whole model on the window, and the
            gradient of what it computes backwards; only the top calls it.
    """

    part: int
    window: Window
    run: Callable[[Callable[[], object]], None]


@dataclass(frozen=True)
class Stage:
    """A part of a model that every batch runs through, forwards and backwards, before the part below it.

    Args:
        targets: The targets in it.
        batches: The number of each batch, and its windows. Takes whether they run once more afterwards; the last run
            leaves the gradient for the stage below.
    """

    targets: list[Target]
    batches: Callable[..., Iterator[tuple[int, list[Call]]]]


class Descent:
    """Carries gradients down: first of what comes after all blocks, then of one block at a time.

    Args:
        reader: Has the model, the targets and the batches, inside its context, and knows their order; no target is
            finished.
        cache_bytes: How much of what blocks return is kept in memory.
        folder: Where the rest goes; None for the system's temporary folder.
        windows: Divides a batch, on the model's device, into what runs at once; None for its windows without labels.
        batches: What is divided, such as the reader's batches with labels; None for those of the reader.

    Attributes:
        outside: The targets that come after all blocks.

    Raises:
        PlanError: If the model is no single sequence of blocks, each of which reads what the one before it returned.
    """

    def __init__(
        self,
        reader: InputReader,
        cache_bytes: int = 0,
        folder: str | os.PathLike[str] | None = None,
        windows: Callable[[Window], Sequence[Window]] | None = None,
        batches: Sequence[Window] | None = None,
    ) -> None:
        self._sequence = sequence_of(reader)
        self._before, self.outside = _outside(reader, self._sequence)
        self._every = reader.batches if batches is None else batches
        self._reader, self._windows = reader, windows or partial(_windows, reader.model)
        self._outputs = OffloadCache(cache_bytes, folder)

    def stages(self, progress: bool | None = None, desc: str = "Sensitivity") -> Iterator[Stage]:
        """What comes after the blocks, and then the blocks from the last to the first one that holds targets.

        All windows of a stage must have run before the next stage is asked for.

        Args:
            progress: Show a progress bar.
            desc: What it says.
        """
        reader, blocks = self._reader, self._sequence.blocks
        inside = [[t for t in reader.targets if reader.block_of(t.name) is block] for block in blocks]
        inside[0] = [*self._before, *inside[0]]
        lowest = next((number for number, targets in enumerate(inside) if targets), len(blocks))
        total = 2 * len(blocks) + 1 - lowest
        try:
            with Bar[object](total=total, desc=desc, unit="block", progress=progress) as bar:
                for number in range(len(blocks)):
                    for index, windows in self._batches():
                        for part, window in enumerate(windows):
                            self._record(number, (index, part), window)
                    bar.update()
                yield Stage(self.outside, partial(self._calls, self._from_top))
                bar.update()
                for number in reversed(range(lowest, len(blocks))):
                    yield Stage(inside[number], partial(self._calls, partial(self._down, number)))
                    bar.update()
        finally:
            self._outputs.close()

    def _batches(self) -> Iterator[tuple[int, Sequence[Window]]]:
        for index, batch in enumerate(self._every):
            yield index, self._windows(batch_to_device(self._reader.model, batch, self._reader.device))

    def _calls(self, run: Callable[..., None], again: bool = False) -> Iterator[tuple[int, list[Call]]]:
        for index, windows in self._batches():
            yield index, [Call(p, window, partial(run, again, (index, p), window)) for p, window in enumerate(windows)]

    @torch.no_grad()
    def _record(self, number: int, key: Hashable, window: Window) -> None:
        """Run a block on what the one before it returned."""
        before = partial(self._outputs.get, (number - 1, key))
        self._outputs.put((number, key), run_block(self._reader, self._sequence, number, window, before))

    def _from_top(self, again: bool, key: Hashable, window: Window, backwards: Callable[[], object]) -> None:
        """Run what comes after the last block, and take the gradient of what it computes."""
        last = len(self._sequence.blocks) - 1
        leaves, output = self._leaves(last, key)
        with self._sequence.replaying(last + 1, output), self._read_by_the_first_block_alone():
            backwards()
        if not again:
            self._outputs.put((last, key), [leaf.grad for leaf in leaves])

    def _down(self, number: int, again: bool, key: Hashable, window: Window, _: Callable[[], object]) -> None:
        """Run a block with gradients, from those of what it returns to those of what the one before it returned."""
        leaves, output = self._leaves(number - 1, key) if number else ([], None)
        alone = self._read_by_the_first_block_alone() if number else nullcontext()
        with alone:
            self._run_down(number, again, key, window, output)
        if number and not again:
            self._outputs.put((number - 1, key), [leaf.grad for leaf in leaves])

    def _run_down(
        self, number: int, again: bool, key: Hashable, window: Window, output: Callable[[], Any] | None
    ) -> None:
        with torch.enable_grad():
            returned = _floating(run_block(self._reader, self._sequence, number, window, output))
        from_above = (self._outputs.get if again else self._outputs.pop)((number, key))
        above = zip(returned, from_above, strict=True)
        pairs = [(value, gradient) for value, gradient in above if gradient is not None and value.requires_grad]
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])

    @contextmanager
    def _read_by_the_first_block_alone(self) -> Iterator[None]:
        """Make sure that what runs inside depends on no target before the blocks, but by what blocks return."""
        leaves: list[Tensor] = []

        def cut(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        with ExitStack() as hooks:
            for target in self._before:
                for module in self._reader.holders[target.name]:
                    Watcher(module, cut, after=True).install(hooks, None)
            yield
        if any(leaf.grad is not None for leaf in leaves):
            names = ", ".join(target.name for target in self._before)
            raise PlanError(
                f"gradients of {type(self._reader.model).__name__} cannot be carried down from block to block, since "
                f"several blocks read what {names} gives: name it in exclude_modules, choose settings without "
                f"gradients, or prune without streaming"
            )

    def _leaves(self, number: int, key: Hashable) -> tuple[list[Tensor], Callable[[], Any]]:
        """What a block returned, as tensors that get gradients, and a function that gives it to the model."""
        values, spec = tree_flatten(self._outputs.get((number, key)))
        leaves = [value.requires_grad_() for value in _floating(values)]

        def output() -> Any:  # copies, which the model may change in place
            return tree_unflatten([v.clone() if isinstance(v, Tensor) else v for v in values], spec)

        return leaves, output


def run_block(
    reader: InputReader, sequence: BlockSequence, number: int, window: Window, output: Callable[[], Any] | None
) -> Any:
    """What a block returns when the one before it returns something that is known.

    Args:
        reader: Runs the model.
        sequence: Its blocks.
        number: The block.
        window: The model inputs.
        output: Returns what the block before it returns; not asked for the first one.

    Raises:
        PlanError: If the window does not come to the block.
    """
    returned: list[Any] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
        returned.append(value)
        raise Stop

    with ExitStack() as context:
        Watcher(sequence.blocks[number], keep, after=True).install(context, None)
        if number and output is not None:
            context.enter_context(sequence.replaying(number, output))
        with suppress(Stop):
            reader.forward(window)
    if not returned:
        raise PlanError(
            f"{type(reader.model).__name__} does not run its blocks alike for every batch, so it cannot be run block "
            f"by block: prune without streaming"
        )
    return returned[0]


def sequence_of(reader: InputReader) -> BlockSequence:
    """The one sequence of blocks of a model.

    Args:
        reader: As of :class:`Descent`.

    Raises:
        PlanError: If there is none, or a block reads more than what the one before it returned.
    """
    sequences = reader.replay.sequences
    what = f"{type(reader.model).__name__} cannot be run and differentiated block by block"
    how = "choose settings without gradients (another criterion or allocation, objective 'layer'), or do not stream"
    if len(sequences) != 1 or not set(reader.kinds) <= sequences[0].kinds:
        raise PlanError(f"{what}: found {len(sequences)} lists of blocks, expected one that every batch uses; {how}")
    sequence = sequences[0]
    if not all(reader.replay.check(sequence)):
        raise PlanError(f"{what}, since some of them read more than what the one before returned; {how}")
    return sequence


def _outside(reader: InputReader, sequence: BlockSequence) -> tuple[list[Target], list[Target]]:
    """The targets before the first block and after the last one."""
    outside = [t for t in reader.targets if reader.block_of(t.name) is None]
    early = [t for t in outside if t.name in sequence.first_use]
    before = [t for t in early if sequence.first_use[t.name] == 0 and _used_once(reader, t)]
    if between := [t.name for t in early if t not in before]:
        raise PlanError(
            f"gradients of {type(reader.model).__name__} cannot be carried down from block to block, since "
            f"{between[0]} is used between the blocks, or before and after them: name it in exclude_modules, choose "
            f"settings without gradients, or prune without streaming"
        )
    return before, [t for t in outside if t not in early]


def _used_once(reader: InputReader, target: Target) -> bool:
    """Whether a target has no other use than its first one."""
    users = reader.users[target.name]
    return len(users) == 1 and id(users[0]) in reader.once


def _windows(model: nn.Module, batch: Window) -> Sequence[Window]:
    return small_batches(model, without_labels(model, batch))


def _floating(value: Any) -> list[Tensor]:
    return [x for x in tree_flatten(value)[0] if isinstance(x, Tensor) and x.is_floating_point()]
