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

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hf_prune.distributed import add_up
from hf_prune.padding import first_input, first_tensor
from hf_prune.spill import Shelf
from hf_prune.tainted import Tainted, tainted

Event = tuple[object, Tensor | None]  # what happened in a run, and a fingerprint of the values that it happened to
_DIRECTIONS = 8  # of a fingerprint
_TOLERANCE = 1e-5  # of a difference, relative to the token


class NotAlikeError(Exception):
    """A run with replayed blocks went another way than one in which they are computed; never leaves the package."""


class Stack:
    """Blocks that run one after the other.

    Args:
        blocks: In the order of their calls.
        targets: Names of the parameters in each block that are to be pruned.
        kinds: Which kinds of batches call them; the others call none.
        samples: Batches of these kinds, on which it is tried whether blocks may be replayed.
        outputs: Where what the last of the blocks that are not computed any more puts out is kept, for each batch.

    Attributes:
        replayed: How many blocks are not computed any more.
        alike: For each block, whether it and those before it may be replayed; None as long as nobody has checked.
        used: By target, the first block that returns after the target's weight was used in any way, as by a tied
            embedding; known once it has been checked.
        recorded: How often a run in progress has recorded each batch.
        called: Which of the blocks that are not computed any more the running batch has called.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        targets: Sequence[set[str]],
        kinds: frozenset[int],
        samples: Sequence[int],
        outputs: Shelf,
    ) -> None:
        self.blocks, self.kinds, self.samples, self.outputs = list(blocks), kinds, list(samples), outputs
        self.replayed = 0
        self.alike: list[bool] | None = None
        self.used: dict[str, int] = {}
        self.recorded: dict[int, int] = {}
        self.called: list[int] = []
        self._waiting = [set(names) for names in targets]  # targets without their final weights, by block
        self._finished = 0  # blocks, of which none is waiting

    def finish(self, finished: Collection[str]) -> None:
        """Say which targets have their final weights in all."""
        while self._finished < len(self.blocks) and self._waiting[self._finished].issubset(finished):
            self._finished += 1

    @property
    def goal(self) -> int:
        """How many blocks may be replayed by now."""
        if self.alike is None:
            return self._finished
        return next((n for n in range(self._finished, 0, -1) if self.alike[n - 1]), 0)

    def wait_for(self, called: Mapping[str, int]) -> None:
        """Say what else is called before blocks return, and must have its final weights before they are replayed.

        Args:
            called: By target, the first block that returns afterwards.
        """
        for name, block in called.items():
            self._waiting[block].add(name)
        self._finished = 0

    def compute(self) -> None:
        """Compute every block from now on."""
        self.alike = [False] * len(self.blocks)
        self.forget()

    def forget(self) -> None:
        """Compute every block until they have been recorded again."""
        self.outputs.close()
        self.recorded.clear()
        self.replayed = 0

    @contextmanager
    def replaying(self, number: int, output: Callable[[], Any]) -> Iterator[None]:
        """Inside, the first blocks return what the last of them put out, and tainted tensors.

        Args:
            number: How many.
            output: Reads what the last of them put out for the batch that is running.
        """
        stand_ins: list[Any] = []  # one for all blocks: a deep model reads it once for each batch

        def replay(i: int, *_: Any, **__: Any) -> Any:
            self.called.append(i)
            if i == number - 1:
                return output()
            if i == 0:  # a batch begins; in another order nothing counts
                stand_ins[:] = [tree_map(tainted, output())]
            return stand_ins[0]

        replaced = self.blocks[:number]
        own = [block.__dict__.get("forward") for block in replaced]
        try:
            for i, block in enumerate(replaced):
                block.__dict__["forward"] = partial(replay, i)
            yield
        finally:
            for block, forward in zip(replaced, own, strict=True):
                _set_forward(block, forward)


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
        self._block_of: dict[int, nn.Module] = {}

    @property
    def active(self) -> bool:
        """Whether any block is not computed any more."""
        return any(stack.replayed for stack in self.stacks)

    def add(self, stack: Stack) -> None:
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

    def behind(self) -> list[Stack]:
        """The stacks with blocks that could be replayed and have yet to be recorded."""
        return [stack for stack in self.stacks if self.enabled and stack.goal > stack.replayed]

    def check(self, stack: Stack, trace: Tracer) -> list[bool]:
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

        return stack.blocks[stack.goal - 1], record

    def stop_recording(self, stack: Stack, batches: int) -> None:
        """Replay what was recorded, if every batch that should called the block, once.

        Args:
            stack: A stack.
            batches: How many of all processes should.
        """
        once = sum(number == 1 for number in stack.recorded.values())
        found = torch.tensor([once, len(stack.recorded) - once])
        if add_up(found).tolist() == [batches, 0]:
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


class Tracer:
    """Runs batches and tells what happens on the way.

    Args:
        run: Runs a batch.
        calls: Modules that multiply with targets, by name.
        users: All modules that have them.
        blocks: Of all stacks.
        read: What a module gets, without padding: (tokens, features).
    """

    def __init__(
        self,
        run: Callable[[int], object],
        calls: Mapping[str, Iterable[nn.Module]],
        users: Mapping[str, Iterable[nn.Module]],
        blocks: Iterable[nn.Module],
        read: Callable[[nn.Module, Any], Tensor | None],
    ) -> None:
        self._run, self._read = run, read
        self._modules = [(("call", name), module) for name, modules in calls.items() for module in modules]
        self._users = [(("use", name), module) for name, modules in users.items() for module in modules]
        self._blocks = list(blocks)
        self._events: list[Event] = []
        self._start: nn.Module | None = None
        self._stop: nn.Module | None = None

    @contextmanager
    def watching(self) -> Iterator[Tracer]:
        """A context in which it can be called."""
        with ExitStack() as hooks:
            for key, module in self._users:
                hooks.callback(module.register_forward_pre_hook(partial(self._note, key)).remove)
            for key, module in self._modules:
                hooks.callback(module.register_forward_pre_hook(partial(self._note_call, key), with_kwargs=True).remove)
            for block in self._blocks:
                hooks.callback(block.register_forward_hook(self._note_block).remove)
            yield self

    def __call__(self, batch: int, start: nn.Module | None = None, stop: nn.Module | None = None) -> list[Event]:
        """What happens while a batch runs: calls and uses of targets, and blocks that return.

        Args:
            batch: Its number.
            start: A block after whose return it counts; None for the start of the run.
            stop: A block with whose return the run ends.
        """
        self._events, self._start, self._stop = [], start, stop
        with torch.random.fork_rng(devices=[]), suppress(_Return):
            torch.default_generator.manual_seed(0)
            self._run(batch)
        return self._events

    def _note(self, key: object, *_: Any) -> None:
        if self._start is None:
            self._events.append((key, None))

    def _note_call(self, key: object, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._start is None:
            self._events.append((key, self._fingerprint(module, first_input(args, kwargs))))

    def _note_block(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self._start:
            self._start = None
        elif self._start is None:
            self._events.append((id(module), self._fingerprint(module, first_tensor(output))))
        if module is self._stop:
            raise _Return

    def _fingerprint(self, module: nn.Module, x: Any) -> Tensor | None:
        if isinstance(x, Tainted):
            raise NotAlikeError
        return fingerprint(self._read(module, x))


class _Return(Exception):
    """All that was asked for has happened."""


def replayable(stack: Stack, trace: Tracer) -> tuple[list[bool], dict[str, int]]:
    """For each block of a stack, whether all goes on as if it were computed, where it and those before are replayed.

    First each block is tried with what comes until the next one returns: where that holds for all of them, it holds for
    what comes later. From the last one for which it does not hold, all are tried to the end.

    Args:
        stack: The stack, of which nothing is replayed.
        trace: Runs batches.

    Returns:
        A flag for each block, and by target the first block that returns after it was called.
    """
    alike, size = [True] * len(stack.blocks), len(stack.blocks)
    called: dict[str, int] = {}
    stack.used = {}
    for batch in stack.samples:
        stack.outputs.close()
        with ExitStack() as hooks:
            for i, block in enumerate(stack.blocks):
                hooks.callback(block.register_forward_hook(partial(_keep, stack.outputs, i)).remove)
            with trace.watching():
                whole = trace(batch)
        places = {key: i for i, (key, _) in enumerate(whole) if isinstance(key, int)}
        if any(id(block) not in places for block in stack.blocks):
            return [False] * size, called  # pruning has made it leave midway
        ends = [places[id(block)] + 1 for block in stack.blocks]
        number = 0  # of the block that returns next
        for place, (key, _) in enumerate(whole[: ends[-1]]):
            number += place >= ends[number]
            if isinstance(key, tuple):
                first = called if key[0] == "call" else stack.used
                first[key[1]] = min(number, first.get(key[1], size))

        def goes_on(
            i: int, stop: int | None, batch: int = batch, whole: list[Event] = whole, ends: list[int] = ends
        ) -> bool:
            """Whether blocks can be replayed, as far as what happens until another one returns."""
            expected = whole[ends[i] : None if stop is None else ends[stop]]
            with stack.replaying(i + 1, partial(stack.outputs.get, i)):
                try:
                    found = trace(batch, stack.blocks[i], None if stop is None else stack.blocks[stop])
                except Exception:
                    return False
            return _same(expected, found)

        # Backwards, so that what the replayed blocks have left behind stays out of date.
        with trace.watching():
            _run_on_other_inputs(stack.blocks[0], trace, batch)
            failed = [i for i in reversed(range(size)) if not goes_on(i, i + 1 if i + 1 < size else None)]
            if failed:
                _run_on_other_inputs(stack.blocks[0], trace, batch)
                for i in reversed(range(failed[0] + 1)):
                    alike[i] = alike[i] and goes_on(i, None)
    stack.forget()
    stack.called.clear()
    return alike, called


def _keep(outputs: Shelf, key: int, module: nn.Module, args: Any, output: Any) -> None:
    outputs.put(key, output)


def _get(outputs: Shelf, current: Callable[[], int]) -> Any:
    return outputs.get(current())


def _same(expected: Sequence[Event], found: Sequence[Event]) -> bool:
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


def _run_on_other_inputs(block: nn.Module, trace: Tracer, batch: int) -> None:
    """Run a batch while a block gets other values than the model hands it; whether that works does not matter."""

    def disturb(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < 2:
            return value
        generator = torch.Generator().manual_seed(0)
        return value + (torch.randn(value.shape, generator=generator).to(value.device) * value.float().std()).to(value)

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return ((disturb(args[0]), *args[1:]), kwargs) if args else (args, {k: disturb(v) for k, v in kwargs.items()})

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(Exception):
            trace(batch)
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
        _set_forward(module, own)


def _set_forward(module: nn.Module, own: Callable[..., Any] | None) -> None:
    if own is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = own
