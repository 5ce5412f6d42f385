"""Finished blocks are not run again: they return what the last of them put out.

A model is run from its start for every target, which is slow for the last layers of a deep one. So the blocks of a
stack (the elements of a ModuleList) that are finished, because all targets in them are pruned, are not computed again.
The last of them returns what it put out before, and those in front of it return tensors that are tainted. That is right
where later modules see nothing of the finished blocks but the output of the last one, which is checked twice:

* Before a stack is replayed, on the first, the smallest and the largest batch of each kind, for each of its blocks: all
  that flows into later targets and out of later blocks must be what it is when every block is computed. Before that,
  the stack runs once on other inputs, so that anything that blocks leave behind for others is out of date.
* In every run, for every batch: the finished blocks are called once each, in order, nothing fails, nothing goes by what
  is tainted, and nothing tainted reaches what is being watched.

What does not pass is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_prune.calibration.block_sequence import BlockSequence
from hf_prune.calibration.trial import Tracer, replayable
from hf_prune.utils.distributed import all_reduce_sum
from hf_prune.utils.offload_cache import OffloadCache


class Replay:
    """The stacks of a model whose finished blocks return what they put out before.

    Args:
        enabled: False to compute every block in every run.

    Attributes:
        stacks: The stacks, whether their blocks can be replayed or not.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.stacks: list[BlockSequence] = []
        self._finished: set[str] = set()
        self._block_of: dict[int, nn.Module] = {}

    @property
    def active(self) -> bool:
        """Whether any block is not computed any more."""
        return any(stack.replayed for stack in self.stacks)

    def add(self, stack: BlockSequence) -> None:
        """Add a stack."""
        self.stacks.append(stack)
        for block in stack.blocks:
            for module in block.modules():
                self._block_of.setdefault(id(module), block)

    def block_of(self, modules: Iterable[nn.Module]) -> nn.Module | None:
        """The block of a stack that holds all of some modules."""
        blocks = [self._block_of.get(id(module)) for module in modules]
        return blocks[0] if blocks and all(block is blocks[0] for block in blocks) else None

    def finish(self, names: set[str]) -> None:
        """Say that these targets have their final weights, so that blocks without others need not run again."""
        self._finished |= names
        for stack in self.stacks:
            stack.finish(self._finished)
            if any(stack.used.get(name, len(stack.blocks)) < stack.replayed for name in names):
                stack.forget()  # what was recorded was put out with the weights before

    def behind(self) -> list[BlockSequence]:
        """The stacks with blocks that could be replayed and have yet to be recorded."""
        return [stack for stack in self.stacks if self.enabled and stack.goal > stack.replayed]

    def check(self, stack: BlockSequence, trace: Tracer) -> list[bool]:
        """Find out which blocks of a stack may be replayed, and make use of it.

        Args:
            stack: The stack.
            trace: Runs batches.
        """
        alike, called = replayable(stack, trace)
        stack.wait_for(called)
        stack.finish(self._finished)
        return alike

    def install(self, hooks: ExitStack, current: Callable[[], int]) -> None:
        """Have blocks return what they put out before.

        Args:
            hooks: Has them computed again at its end.
            current: Tells the number of the batch that is running.
        """
        for stack in self.stacks:
            if stack.replayed:
                output = partial(_get, stack.outputs, current)
                hooks.enter_context(stack.replaying(stack.replayed, output))

    def start_batch(self) -> None:
        """Say that a batch begins to run."""
        for stack in self.stacks:
            stack.called.clear()

    def is_complete(self, kind: int, stopped: bool) -> bool:
        """Whether a batch called the replayed blocks as batches of its kind do.

        Args:
            kind: The kind.
            stopped: Whether it was stopped before its end; it may not have come to a stack.
        """

        def expected(stack: BlockSequence) -> bool:
            if not stack.called and (stopped or kind not in stack.kinds):
                return True
            return kind in stack.kinds and stack.called == list(range(stack.replayed))

        return all(map(expected, self.stacks))

    def start_recording(
        self, stack: BlockSequence, current: Callable[[], int]
    ) -> tuple[nn.Module, Callable[..., None]]:
        """The last block that could be replayed, and the hook that keeps what it puts out in a run of all batches.

        Args:
            stack: A stack.
            current: Tells the number of the batch that is running.
        """
        stack.recorded.clear()

        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            stack.outputs.put(current(), output)
            stack.recorded[current()] = stack.recorded.get(current(), 0) + 1

        return stack.blocks[stack.goal - 1], record

    def stop_recording(self, stack: BlockSequence, batches: int) -> None:
        """Replay what was recorded, if every batch that should called the block, once.

        Args:
            stack: A stack.
            batches: How many of all processes should.
        """
        once = sum(number == 1 for number in stack.recorded.values())
        found = torch.tensor([once, len(stack.recorded) - once])
        if all_reduce_sum(found).tolist() == [batches, 0]:
            stack.replayed = stack.goal
        else:
            stack.compute()
        stack.recorded.clear()

    def give_up(self) -> None:
        """Compute every block that was replayed from now on."""
        for stack in self.stacks:
            if stack.replayed:
                stack.compute()

    def close(self) -> None:
        """Forget what blocks put out."""
        for stack in self.stacks:
            stack.outputs.close()


def _get(outputs: OffloadCache, current: Callable[[], int]) -> Any:
    return outputs.get(current())
