"""Whether a model computes the same with finished blocks replayed: tried, not assumed."""

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
_TOLERANCE = 1e-5  # of a difference, relative to the norm of the token


class NotAlikeError(Exception):
    """A run with replayed blocks went another way than one in which they are computed; never leaves the package."""


class Tracer:
    """Runs batches and lists what happens on the way.

    Args:
        run: Runs a batch, by its number.
        holders: By target, the modules that multiply with it.
        users: By target, all modules that have it.
        blocks: The blocks of all sequences.
        read: The input of a module without padding: (tokens, features).
    """

    def __init__(
        self,
        run: Callable[[int], object],
        holders: Mapping[str, Iterable[nn.Module]],
        users: Mapping[str, Iterable[nn.Module]],
        blocks: Iterable[nn.Module],
        read: Callable[[nn.Module, Any], Tensor | None],
    ) -> None:
        self._run, self._read = run, read
        self._holders = [(("call", name), module) for name, modules in holders.items() for module in modules]
        self._users = [(("use", name), module) for name, modules in users.items() for module in modules]
        self._blocks = list(blocks)
        self._events: list[Event] = []
        self._start: nn.Module | None = None
        self._stop: nn.Module | None = None

    @contextmanager
    def watching(self) -> Iterator[Tracer]:
        """A context in which the tracer can be called."""
        with ExitStack() as hooks:
            for key, module in self._users:
                hooks.callback(module.register_forward_pre_hook(partial(self._note, key)).remove)
            for key, module in self._holders:
                hooks.callback(module.register_forward_pre_hook(partial(self._note_call, key), with_kwargs=True).remove)
            for block in self._blocks:
                hooks.callback(block.register_forward_hook(self._note_block).remove)
            yield self

    def __call__(self, batch: int, start: nn.Module | None = None, stop: nn.Module | None = None) -> list[Event]:
        """Run a batch, and return what happens: calls and uses of targets, and blocks that return.

        Args:
            batch: Its number.
            start: A block after whose return events count; None for the start of the run.
            stop: A block with whose return the run ends.
        """
        self._events, self._start, self._stop = [], start, stop
        # What the model draws at random is then the same in every run.
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
    """The block at which a run ends has returned."""


def try_replay(sequence: BlockSequence, trace: Tracer) -> tuple[list[bool], dict[str, int]]:
    """For each block of a sequence, whether all goes on as if it were computed when it and those before are replayed.

    Trying every block to the end of the model would take time that grows with the square of the depth. So each block is
    first tried only until the next one returns: where that agrees for all blocks, the rest agrees as well, by
    induction. At the last block that fails the induction breaks, so that block and those before it are tried to the
    end.

    Args:
        sequence: The sequence, of which nothing is replayed.
        trace: Runs batches.

    Returns:
        A flag for each block, and by target the first block that returns after it was called.
    """
    size = len(sequence.blocks)
    safe = [True] * size
    called: dict[str, int] = {}
    sequence.first_use = {}
    for batch in sequence.samples:
        whole = _trace_computed(sequence, trace, batch)
        places = {key: i for i, (key, _) in enumerate(whole) if isinstance(key, int)}
        if any(id(block) not in places for block in sequence.blocks):
            return [False] * size, called  # pruning has made the model leave the sequence midway
        ends = [places[id(block)] + 1 for block in sequence.blocks]
        _note_first(whole[: ends[-1]], ends, called, sequence.first_use)

        def goes_on(
            i: int, stop: int | None, batch: int = batch, whole: list[Event] = whole, ends: list[int] = ends
        ) -> bool:
            """Whether all agrees after block ``i``, as far as the return of block ``stop``, or to the end."""
            expected = whole[ends[i] : None if stop is None else ends[stop]]
            with sequence.replaying(i + 1, partial(sequence.outputs.get, i)):
                try:
                    events = trace(batch, sequence.blocks[i], None if stop is None else sequence.blocks[stop])
                except Exception:  # whatever it is, it would not have come without the replay
                    return False
            return _same(expected, events)

        # Blocks may leave values behind for later ones, outside of what they return. The run on other inputs makes
        # them out of date, and going backwards keeps them so: no trial computes a block that a later trial replays.
        with trace.watching():
            _run_on_other_inputs(sequence.blocks[0], trace, batch)
            failed = [i for i in reversed(range(size)) if not goes_on(i, i + 1 if i + 1 < size else None)]
            if failed:
                _run_on_other_inputs(sequence.blocks[0], trace, batch)
                for i in reversed(range(failed[0] + 1)):
                    safe[i] = safe[i] and goes_on(i, None)
    sequence.forget()
    sequence.called.clear()
    return safe, called


def _trace_computed(sequence: BlockSequence, trace: Tracer, batch: int) -> list[Event]:
    """What happens in a batch with every block computed, whose outputs are kept for the trials."""
    sequence.outputs.close()
    with ExitStack() as hooks:
        for i, block in enumerate(sequence.blocks):
            hooks.callback(block.register_forward_hook(partial(_keep, sequence.outputs, i)).remove)
        with trace.watching():
            return trace(batch)


def _keep(outputs: OffloadCache, key: int, module: nn.Module, args: Any, output: Any) -> None:
    outputs.put(key, output)


def _note_first(events: Sequence[Event], ends: Sequence[int], called: dict[str, int], used: dict[str, int]) -> None:
    """Note by target which block returns next after its first call, and after the first use of its weight.

    Args:
        events: Until the last block returns.
        ends: How many events have happened when each block has returned.
        called: Gets the blocks after calls.
        used: Gets the blocks after uses.
    """
    block = 0  # that returns next
    for place, (key, _) in enumerate(events):
        block += place >= ends[block]
        if isinstance(key, tuple):
            kind, name = key
            first = called if kind == "call" else used
            first[name] = min(block, first.get(name, block))


def _same(expected: Sequence[Event], events: Sequence[Event]) -> bool:
    return len(expected) == len(events) and all(
        a == b and _close(x, y) for (a, x), (b, y) in zip(expected, events, strict=True)
    )


def fingerprint(rows: Any) -> Tensor | None:
    """The norm of each token and its components along eight random directions: (tokens, 9), to compare runs by.

    Args:
        rows: (tokens, features); anything else than a floating-point tensor has no fingerprint.
    """
    if not isinstance(rows, Tensor) or not rows.is_floating_point() or rows.is_meta or rows.dim() == 0:
        return None
    rows = rows.detach().reshape(-1, rows.shape[-1]).float()
    generator = torch.Generator().manual_seed(rows.shape[1])
    directions = torch.randn(rows.shape[1], _DIRECTIONS, generator=generator).to(rows.device)
    return torch.cat([rows.norm(dim=1, keepdim=True), rows @ directions], 1)


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether fingerprints agree but for rounding, each token measured by its own norm; NaN equals NaN only."""
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
