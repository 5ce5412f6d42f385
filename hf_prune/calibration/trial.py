"""Whether a model computes the same with finished blocks replaced: tried, not assumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.block_sequence import BlockSequence
from hf_prune.calibration.padding import first_input, first_tensor
from hf_prune.calibration.tainted import Tainted
from hf_prune.utils.offload_cache import OffloadCache

Event = tuple[object, Tensor | None]  # what happened in a run, and a fingerprint of the values that it happened to
_DIRECTIONS = 8  # of a fingerprint
_TOLERANCE = 1e-5  # of a difference, relative to the token


class NotAlikeError(Exception):
    """A run with replayed blocks went another way than one in which they are computed; never leaves the package."""


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


def replayable(stack: BlockSequence, trace: Tracer) -> tuple[list[bool], dict[str, int]]:
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


def _keep(outputs: OffloadCache, key: int, module: nn.Module, args: Any, output: Any) -> None:
    outputs.put(key, output)


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
