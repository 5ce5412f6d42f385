"""Finished blocks are not run again: they return what the last of them put out.

A model is run from its start for every target, which is slow for the last layers of a deep one. So the blocks of a
stack (the elements of a ModuleList) that are finished, because all targets in them are pruned, are not computed again:
all of them return what the last of them put out. This holds where each block is called once and later modules see
nothing of the blocks before but the output of the last one. It is checked on the first batch each time another block
is finished: if the inputs of the next targets differ from those of a run in which that block is still computed, every
block is computed from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.distributed import add_up, processes
from hf_prune.spill import Shelf
from hf_prune.sums import InputSum


@dataclass
class Stack:
    """Blocks that run one after the other.

    Args:
        blocks: In the order of their calls.
        targets: Names of the parameters in each block that have yet to be pruned.
        outputs: What the last of the blocks that are not computed any more put out, for each batch.
        replayed: How many blocks are not computed any more.
        recorded: Batches for which a run in progress has replaced it.
        before: What ``replayed`` and the first of ``outputs`` were before they last changed.
    """

    blocks: list[nn.Module]
    targets: list[set[str]]
    outputs: Shelf
    replayed: int = 0
    recorded: set[int] = field(default_factory=set)
    before: tuple[int, Any] = (0, None)

    @property
    def finished(self) -> int:
        """How many blocks have no target left before the first one that has."""
        return next((i for i, names in enumerate(self.targets) if names), len(self.blocks))

    def state(self, batch: int) -> tuple[int, Any]:
        """How many blocks are replayed, and what they put out for a batch, if this process has it."""
        return self.replayed, self.outputs.get(batch) if batch in self.outputs else None

    def replays(self, current: Callable[[], int]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What blocks that are not computed any more do instead: all but the last of them, and the last.

        What the others put out is never looked at, so they share one copy, which a block between them may have changed:
        a deep model reads what it replays twice for each batch, not once for each block.

        Args:
            current: Tells the number of the batch that is running.
        """
        shared: list[tuple[int, Any]] = [(-1, None)]

        def replay(*args: Any, **kwargs: Any) -> Any:
            if shared[0][0] != current():
                shared[0] = current(), self.outputs.get(current())
            return shared[0][1]

        return replay, lambda *args, **kwargs: self.outputs.get(current())


class Replay:
    """The stacks of a model whose finished blocks return what they put out before.

    Attributes:
        stacks: The stacks; one that turns out to be of another kind is left out from then on.
        unchecked: Whether blocks are replayed that no run has been compared without.
    """

    def __init__(self) -> None:
        self.stacks: list[Stack] = []
        self.unchecked = False
        self._first = processes()[0]  # the first batch of this process

    def block_of(self, modules: Iterable[nn.Module]) -> nn.Module | None:
        """The block that holds all of some modules, where what runs before it need not be computed again."""
        wanted = {id(module) for module in modules}
        for stack in self.stacks:
            for block in stack.blocks:
                if wanted <= {id(module) for module in block.modules()}:
                    return block
        return None

    def finish(self, names: set[str]) -> None:
        """Say that these targets have their final weights, so that blocks without others need not run again."""
        for stack in self.stacks:
            for left in stack.targets:
                left -= names

    def behind(self) -> list[Stack]:
        """The stacks with finished blocks that have yet to put out what later runs replay."""
        return [stack for stack in self.stacks if stack.finished > stack.replayed]

    def install(self, hooks: ExitStack, current: Callable[[], int]) -> None:
        """Have blocks return what they put out before.

        Args:
            hooks: Has them computed again at its end.
            current: Tells the number of the batch that is running.
        """
        for stack in self.stacks:
            replay, replay_last = stack.replays(current)
            for i, block in enumerate(stack.blocks[: stack.replayed], start=1):
                forward = replay_last if i == stack.replayed else replay
                hooks.enter_context(replaced_forward(block, forward))

    def start_recording(self, stack: Stack, current: Callable[[], int]) -> tuple[nn.Module, Callable[..., None]]:
        """The last finished block, and the hook that keeps what it puts out in a run of all batches.

        Args:
            stack: A stack.
            current: Tells the number of the batch that is running.
        """
        stack.before = stack.state(self._first)

        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            stack.outputs.put(current(), output)
            stack.recorded.add(current())

        return stack.blocks[stack.finished - 1], record

    def stop_recording(self, stack: Stack, batches: int) -> None:
        """Replay what was recorded, if all batches called the block.

        Args:
            stack: A stack.
            batches: How many all processes ran.
        """
        recorded = int(add_up(torch.tensor(len(stack.recorded))))
        if recorded == batches:
            stack.replayed, self.unchecked = stack.finished, True
        elif recorded:
            self._give_up([stack])
        stack.recorded.clear()

    def check(self, run: Callable[[], Mapping[str, InputSum]]) -> None:
        """Compare what a run gives with and without the blocks replayed last, and give up if it differs.

        Args:
            run: Runs the first batch of each process, and records nothing.
        """
        self.unchecked = False
        now = run()
        after = [stack.state(self._first) for stack in self.stacks]
        self._set([stack.before for stack in self.stacks])
        before = run()
        self._set(after)
        if not all(_alike(expected.sums, now[name].sums) for name, expected in before.items()):
            self._give_up(self.stacks)

    def _set(self, states: Iterable[tuple[int, Any]]) -> None:
        for stack, (replayed, output) in zip(self.stacks, states, strict=True):
            stack.replayed = replayed
            if output is not None:
                stack.outputs.put(self._first, output)

    def _give_up(self, stacks: Iterable[Stack]) -> None:
        for stack in list(stacks):
            stack.outputs.close()
            self.stacks.remove(stack)

    def close(self) -> None:
        """Forget what blocks put out."""
        for stack in self.stacks:
            stack.outputs.close()


def _alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether sums are the same but for rounding."""
    return a.keys() == b.keys() and all(bool((a[k] - b[k]).abs().max() <= 1e-3 * a[k].abs().max()) for k in a)


def outer_lists(model: nn.Module, targets: set[int]) -> list[list[nn.Module]]:
    """The elements of every ModuleList that holds targets and lies in no other such list."""
    found: list[list[nn.Module]] = []
    inside: set[int] = set()
    for module in model.modules():  # parents come first
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            below = {id(part) for part in module.modules()}
            if below & targets:
                found.append(list(module))
                inside |= below
    return found


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Call another forward inside, and leave the module as it was."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
