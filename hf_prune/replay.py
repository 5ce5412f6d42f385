"""Finished blocks are not run again: they return what the last of them put out.

A model is run from its start for every target, which is slow for the last layers of a deep one. So the blocks of a
stack (the elements of a ModuleList) that are finished, because all targets in them are pruned, are not computed again.
The last of them returns what it put out before, and those in front of it return NaN. That is right where later modules
see nothing of the finished blocks but the output of the last one, which is checked twice:

* Before a stack is replayed, on one batch of each kind, for each of its blocks: all that flows into later targets and
  out of later blocks must be what it is when every block is computed. Before that, the stack runs once on other inputs,
  so that anything that blocks leave behind for others is out of date.
* In every run, for every batch: the finished blocks are called once each, in order, nothing fails, and no NaN reaches
  what is being watched.

What does not pass is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hf_prune.distributed import add_up
from hf_prune.spill import Shelf

Event = tuple[object, Tensor | None]  # what happened in a run, and a fingerprint of the values that it happened to
_DIRECTIONS = 8  # of a fingerprint
_TOLERANCE = 1e-5  # of a difference, relative to the token


class NotAlikeError(Exception):
    """A run with replayed blocks went another way than one in which they are computed; never leaves the package."""


@dataclass(eq=False)
class Stack:
    """Blocks that run one after the other.

    Args:
        blocks: In the order of their calls.
        targets: Names of the parameters in each block that have yet to be pruned.
        kinds: Which kinds of batches call them; the others call none.
        outputs: What the last of the blocks that are not computed any more put out, for each batch.
        replayed: How many blocks are not computed any more.
        alike: For each block, whether it and those before it may be replayed; None as long as nobody has checked.
        before: For each block, targets that are called before it returns.
        users: For each block, targets whose weights are used in any way before it returns, as by a tied embedding.
        recorded: How often a run in progress has recorded each batch.
        called: Which of the blocks that are not computed any more the running batch has called.
    """

    blocks: list[nn.Module]
    targets: list[set[str]]
    kinds: frozenset[int]
    outputs: Shelf
    replayed: int = 0
    alike: list[bool] | None = None
    before: list[set[str]] = field(default_factory=list)
    users: list[set[str]] = field(default_factory=list)
    recorded: dict[int, int] = field(default_factory=dict)
    called: list[int] = field(default_factory=list)

    def goal(self, finished: Collection[str]) -> int:
        """How many blocks may be replayed once these targets have their final weights."""
        done = next((i for i, names in enumerate(self.targets) if names), len(self.blocks))
        if self.alike is None:
            return done
        able = (n for n in range(1, done + 1) if self.alike[n - 1] and self.before[n - 1] <= set(finished))
        return max(able, default=0)

    def compute(self) -> None:
        """Compute every block from now on."""
        self.alike = [False] * len(self.blocks)
        self.before, self.users = [set() for _ in self.blocks], [set() for _ in self.blocks]
        self.forget()

    def forget(self) -> None:
        """Compute every block until they have been recorded again."""
        self.outputs.close()
        self.recorded.clear()
        self.replayed = 0

    def install(self, hooks: ExitStack, number: int, current: Callable[[], object], output: Callable[[], Any]) -> None:
        """Have the first blocks return what the last of them put out, and NaN.

        Args:
            hooks: Has them computed again at its end.
            number: How many.
            current: Tells which batch is running.
            output: Reads what the last of them put out for it.
        """
        poison: list[tuple[object, Any]] = []  # one copy for all blocks: a deep model reads it once for each batch

        def replay(i: int, *_: Any, **__: Any) -> Any:
            self.called.append(i)
            if i == number - 1:
                return output()
            if not poison or poison[0][0] != current():
                poison[:] = [(current(), tree_map(_poisoned, output()))]
            return poison[0][1]

        for i, block in enumerate(self.blocks[:number]):
            hooks.enter_context(replaced_forward(block, partial(replay, i)))


class Replay:
    """The stacks of a model whose finished blocks return what they put out before.

    Args:
        enabled: False to compute every block in every run.

    Attributes:
        stacks: The stacks, whether their blocks can be replayed or not.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.stacks: list[Stack] = []
        self._finished: set[str] = set()

    @property
    def active(self) -> bool:
        """Whether any block is not computed any more."""
        return any(stack.replayed for stack in self.stacks)

    def block_of(self, modules: Iterable[nn.Module]) -> nn.Module | None:
        """The block of a stack that holds all of some modules."""
        wanted = {id(module) for module in modules}
        for stack in self.stacks:
            for block in stack.blocks:
                if wanted <= {id(module) for module in block.modules()}:
                    return block
        return None

    def finish(self, names: set[str]) -> None:
        """Say that these targets have their final weights, so that blocks without others need not run again."""
        self._finished |= names
        for stack in self.stacks:
            for left in stack.targets:
                left -= names
            if stack.replayed and names & stack.users[stack.replayed - 1]:
                stack.forget()  # what was recorded was put out with the weights before

    def behind(self) -> list[Stack]:
        """The stacks with blocks that could be replayed and have yet to be recorded."""
        return [stack for stack in self.stacks if self.enabled and stack.goal(self._finished) > stack.replayed]

    def install(self, hooks: ExitStack, current: Callable[[], int]) -> None:
        """Have blocks return what they put out before.

        Args:
            hooks: Has them computed again at its end.
            current: Tells the number of the batch that is running.
        """
        for stack in self.stacks:
            stack.install(hooks, stack.replayed, current, partial(_get, stack.outputs, current))

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

        def expected(stack: Stack) -> bool:
            if not stack.called and (stopped or kind not in stack.kinds):
                return True
            return kind in stack.kinds and stack.called == list(range(stack.replayed))

        return all(map(expected, self.stacks))

    def start_recording(self, stack: Stack, current: Callable[[], int]) -> tuple[nn.Module, Callable[..., None]]:
        """The last block that could be replayed, and the hook that keeps what it puts out in a run of all batches.

        Args:
            stack: A stack.
            current: Tells the number of the batch that is running.
        """
        stack.recorded.clear()

        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            stack.outputs.put(current(), output)
            stack.recorded[current()] = stack.recorded.get(current(), 0) + 1

        return stack.blocks[stack.goal(self._finished) - 1], record

    def stop_recording(self, stack: Stack, batches: int) -> None:
        """Replay what was recorded, if every batch that should called the block, once.

        Args:
            stack: A stack.
            batches: How many of all processes should.
        """
        once = sum(number == 1 for number in stack.recorded.values())
        found = torch.tensor([once, len(stack.recorded) - once])
        if add_up(found).tolist() == [batches, 0]:
            stack.replayed = stack.goal(self._finished)
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


def replayable(stack: Stack, trace: Callable[[int], list[Event]]) -> list[bool]:
    """For each block of a stack, whether all goes on as if it were computed, where it and those before are replayed.

    Args:
        stack: The stack, which gets to know what comes before its blocks return; nothing in the model is replayed.
        trace: Runs the first batch of a kind, and tells what happened: ``("call", name)`` and ``("use", name)`` of
            targets, and the ids of blocks as they return.
    """
    alike = [True] * len(stack.blocks)
    stack.before, stack.users = [set() for _ in stack.blocks], [set() for _ in stack.blocks]
    for kind in sorted(stack.kinds):
        stack.outputs.close()
        with ExitStack() as hooks:
            for i, block in enumerate(stack.blocks):
                hooks.callback(block.register_forward_hook(partial(_keep, stack.outputs, i)).remove)
            whole = trace(kind)
        for i, block in enumerate(stack.blocks):
            for what, name in (key for key, _ in _until(whole, block) if isinstance(key, tuple)):
                (stack.before if what == "call" else stack.users)[i].add(name)
        with _other_inputs(stack.blocks[0]), suppress(Exception):
            trace(kind)
        for i in reversed(range(len(stack.blocks))):  # so that what these blocks leave behind stays out of date
            if alike[i]:
                with ExitStack() as hooks:
                    stack.install(hooks, i + 1, lambda: 0, partial(stack.outputs.get, i))
                    alike[i] = _same(whole, _attempt(trace, kind), stack.blocks[i])
    stack.forget()
    stack.called.clear()
    return alike


def _attempt(trace: Callable[[int], list[Event]], kind: int) -> list[Event]:
    """What happens when a batch runs; nothing, if that fails."""
    try:
        return trace(kind)
    except Exception:
        return []


def _get(outputs: Shelf, current: Callable[[], int]) -> Any:
    return outputs.get(current())


def _keep(outputs: Shelf, key: int, module: nn.Module, args: Any, output: Any) -> None:
    outputs.put(key, output)


def _until(events: Sequence[Event], block: nn.Module) -> Sequence[Event]:
    """What happened until a block returned."""
    end = next((i for i, (key, _) in enumerate(events) if key == id(block)), len(events))
    return events[:end]


def _same(expected: Sequence[Event], found: Sequence[Event], block: nn.Module) -> bool:
    """Whether a block returned, and the same happened from then on."""
    expected = expected[len(_until(expected, block)) :]
    found = found[len(_until(found, block)) :]
    return len(expected) == len(found) and all(
        a == b and _close(x, y) for (a, x), (b, y) in zip(expected, found, strict=True)
    )


def fingerprint(rows: Any) -> Tensor | None:
    """(tokens, 9): by which a token is known: its norm, and what it is along some random directions.

    Args:
        rows: (tokens, features); None is known of anything else.
    """
    if not isinstance(rows, Tensor) or not rows.is_floating_point() or rows.is_meta or rows.dim() == 0:
        return None
    rows = rows.detach().reshape(-1, rows.shape[-1]).float()
    generator = torch.Generator().manual_seed(rows.shape[1])
    directions = torch.randn(rows.shape[1], _DIRECTIONS, generator=generator).to(rows.device)
    return torch.cat([rows.norm(dim=1, keepdim=True), rows @ directions], 1)


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether tokens are the same but for rounding, each measured by itself; NaN is only like NaN."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape:
        return False
    near = (a - b).abs() <= _TOLERANCE * a[:, :1]
    return bool((near | (a == b) | (a.isnan() & b.isnan())).all())


def _poisoned(value: Any) -> Any:
    return torch.full_like(value, torch.nan) if isinstance(value, Tensor) and value.is_floating_point() else value


def has_nan(value: Any) -> bool:
    """Whether a tensor has a NaN: one fast sum, and a close look only if that has."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
        return False
    return bool(value.sum().isnan()) and bool(value.isnan().any())


@contextmanager
def _other_inputs(block: nn.Module) -> Iterator[None]:
    """Inside, a block gets other values than the model hands it."""

    def disturb(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < 2:
            return value
        generator = torch.Generator().manual_seed(0)
        return value + (torch.randn(value.shape, generator=generator).to(value.device) * value.float().std()).to(value)

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return ((disturb(args[0]), *args[1:]), kwargs) if args else (args, {k: disturb(v) for k, v in kwargs.items()})

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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
