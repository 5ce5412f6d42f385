"""Finished blocks are not computed again: they return what the last of them returned before.

A model is run from its start for every target, which is slow for the last layers of a deep one. So blocks of a sequence
(the elements of a ModuleList) are not computed again once they are finished, that is, all targets in them are pruned.
The last of them returns its recorded output, and those before it return tainted tensors. That is right where later
modules see nothing of the finished blocks but the output of the last one. It is checked twice:

* Before a sequence is replayed, on the first, the smallest and the largest batch of each kind, for each of its blocks:
  all inputs of later targets and all outputs of later blocks must be what they are when every block is computed. Before
  that, the sequence runs once on other inputs, so that anything that blocks leave behind for others is out of date.
  Readers of the same model, targets and batches may share what one of them has found (``trials``).
* In every run, for every batch: the finished blocks are called once each, in order, nothing fails, no branch depends on
  a tainted value, and nothing tainted reaches a module that is watched.

Blocks that do not pass are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_prune.calibration.block_sequence import BlockSequence
from hf_prune.calibration.trial import Tracer, try_replay
from hf_prune.utils.distributed import all_reduce_sum, broadcast, fail_together
from hf_prune.utils.offload_cache import OffloadCache


class Trial(NamedTuple):
    """What was found for a sequence.

    Args:
        safe: For each block whether it and those before it may be replayed.
        called: By target, the first block that returns after its call.
        first_use: See :class:`BlockSequence`.
    """

    safe: list[bool]
    called: dict[str, int]
    first_use: dict[str, int]


Trials = dict[Hashable, Trial]  # by the blocks and the samples that they were tried on


class Replay:
    """The sequences of blocks of a model, whose finished blocks return what they returned before.

    Args:
        tracer: Makes what runs batches to try it, for all sequences.
        batches: The batches.
        enabled: False to compute every block in every run.
        trials: What was found before for the same model, batches and targets, and is from now on.

    Attributes:
        sequences: The sequences, whether their blocks can be replayed or not.
    """

    def __init__(
        self,
        tracer: Callable[[Sequence[BlockSequence]], Tracer],
        batches: Sequence[object],
        enabled: bool = True,
        trials: Trials | None = None,
    ) -> None:
        self.enabled = enabled
        self._batches = batches
        self._trials: Trials = {} if trials is None else trials
        self.sequences: list[BlockSequence] = []
        self._tracer = tracer
        self._finished: set[str] = set()
        self._block_of: dict[int, nn.Module] = {}

    @property
    def active(self) -> bool:
        """Whether any block is replayed."""
        return any(sequence.replayed for sequence in self.sequences)

    def add(self, sequence: BlockSequence) -> None:
        """Add a sequence."""
        self.sequences.append(sequence)
        for block in sequence.blocks:
            for module in block.modules():
                self._block_of.setdefault(id(module), block)

    def block_of(self, modules: Iterable[nn.Module]) -> nn.Module | None:
        """The block of a sequence that holds all of some modules."""
        blocks = [self._block_of.get(id(module)) for module in modules]
        return blocks[0] if blocks and all(block is blocks[0] for block in blocks) else None

    def finish(self, names: set[str]) -> None:
        """Say that these targets have their final weights, so that blocks without others need not run again."""
        self._finished |= names
        for sequence in self.sequences:
            sequence.finish(self._finished)
            # A target outside of a replayed block whose weight the block uses, such as a tied embedding: what was
            # recorded was computed with the weight before.
            if any(sequence.first_use.get(name, len(sequence.blocks)) < sequence.replayed for name in names):
                sequence.forget()

    def pending(self) -> list[BlockSequence]:
        """The sequences with blocks that can be replayed and are still to be recorded, as far as they were tried."""
        return [sequence for sequence in self.sequences if self.enabled and sequence.replayable > sequence.replayed]

    def ready_to_record(self) -> list[BlockSequence]:
        """The :meth:`pending` sequences, all of which were tried."""
        for sequence in self.pending():
            self.check(sequence)
        return self.pending()

    def check(self, sequence: BlockSequence) -> list[bool]:
        """Try which blocks of a sequence may be replayed, unless that was done before.

        Returns:
            For each block whether it and those before it may be, the same in all processes.
        """
        if sequence.safe is None:
            key = (*map(id, sequence.blocks), *(id(self._batches[index]) for index in sequence.samples))
            if key not in self._trials:
                with fail_together():
                    safe, called = try_replay(sequence, self._tracer(self.sequences))
                self._trials[key] = Trial(broadcast(torch.tensor(safe)).tolist(), called, sequence.first_use)
            found = self._trials[key]
            sequence.first_use = found.first_use
            sequence.wait_for(found.called)
            sequence.finish(self._finished)
            sequence.safe = list(found.safe)
        return sequence.safe

    def install(self, hooks: ExitStack, current: Callable[[], int]) -> None:
        """Have blocks return their recorded outputs.

        Args:
            hooks: Has them computed again at its end.
            current: Returns the number of the batch that is running.
        """
        for sequence in self.sequences:
            if sequence.replayed:
                output = partial(_get, sequence.outputs, current)
                hooks.enter_context(sequence.replaying(sequence.replayed, output))

    def start_batch(self) -> None:
        """Say that a batch begins to run."""
        for sequence in self.sequences:
            sequence.called.clear()

    def is_complete(self, kind: int, stopped: bool) -> bool:
        """Whether the batch that has run called the replayed blocks as batches of its kind do.

        Args:
            kind: Its kind.
            stopped: Whether it was stopped before its end, perhaps before it came to a sequence.
        """

        def as_expected(sequence: BlockSequence) -> bool:
            if not sequence.called and (stopped or kind not in sequence.kinds):
                return True
            return kind in sequence.kinds and sequence.called == list(range(sequence.replayed))

        return all(map(as_expected, self.sequences))

    def start_recording(
        self, sequence: BlockSequence, current: Callable[[], int]
    ) -> tuple[nn.Module, Callable[..., None]]:
        """The last block that can be replayed, and the hook that records its outputs in a run of all batches.

        Args:
            sequence: A sequence.
            current: Returns the number of the batch that is running.
        """
        sequence.recorded.clear()

        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            sequence.outputs.put(current(), output)
            sequence.recorded[current()] = sequence.recorded.get(current(), 0) + 1

        return sequence.blocks[sequence.replayable - 1], record

    def stop_recording(self, sequence: BlockSequence, batches: int) -> None:
        """Replay what was recorded, if every batch that calls the block was recorded once, and no other was.

        Args:
            sequence: A sequence.
            batches: How many batches call the block, over all processes.
        """
        once = sum(number == 1 for number in sequence.recorded.values())
        counts = torch.tensor([once, len(sequence.recorded) - once])
        if all_reduce_sum(counts).tolist() == [batches, 0]:
            sequence.replayed = sequence.replayable
        else:
            sequence.give_up()
        sequence.recorded.clear()

    def give_up(self) -> None:
        """Compute every block that was replayed from now on."""
        for sequence in self.sequences:
            if sequence.replayed:
                sequence.give_up()

    def close(self) -> None:
        """Forget all outputs."""
        for sequence in self.sequences:
            sequence.outputs.close()


def _get(outputs: OffloadCache, current: Callable[[], int]) -> Any:
    return outputs.get(current())
