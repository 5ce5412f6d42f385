"""Progress of long work: a bar on a terminal and in a notebook, lines in a log, and calls of a listener."""

from __future__ import annotations

import builtins
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Listener = Callable[[str, int, "int | None"], object]

_DELAY = 1  # seconds: what takes less shows no bar
_EVERY = 10.0  # seconds from line to line where there is no terminal
_SHOWN: ContextVar[bool] = ContextVar("hf_prune_shows_progress", default=False)
_LISTENER: ContextVar[Listener | None] = ContextVar("hf_prune_progress", default=None)
_HIDDEN: ContextVar[bool] = ContextVar("hf_prune_bars_hidden", default=False)


@contextmanager
def without_bars() -> Iterator[None]:
    """Show no progress bar within this context; listeners are told all the same."""
    token = _HIDDEN.set(True)
    try:
        yield
    finally:
        _HIDDEN.reset(token)


@contextmanager
def listen_to_progress(listener: Listener) -> Iterator[None]:
    """Report the progress of every long loop of hf_prune to a function, within this context.

    An exception from the function ends the loop; a pruning then changes nothing, as after any other error. The
    function is called in the thread that opened the context.

    Args:
        listener: Receives what is being done, such as ``"Calibrating"``, the number of steps done, and the number of
            all steps, or None if it is not known.

    Example:
        >>> from hf_prune import PruningConfig, prune
        >>> def show(title, done, total):
        ...     print(title, done, total)
        >>> with listen_to_progress(show):  # doctest: +SKIP
        ...     prune(model, 0.5, criterion="wanda", calibration=batches)
    """
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


class Bar(Generic[Item]):
    """The progress of a loop, to iterate over or to update by hand.

    On a terminal and in a notebook a bar with the time left, once the loop has run for a second; elsewhere, such as in
    a log, a line on stderr every ten seconds.

    Args:
        items: What to iterate over; nothing if :meth:`update` is called by hand.
        desc: What is being done.
        unit: The name of a step.
        total: The number of steps, if ``items`` has no length.
        progress: Whether to show it; None shows it in the command line, and where somebody works interactively.
    """

    def __init__(
        self,
        items: Iterable[Item] = (),
        *,
        desc: str,
        unit: str = "batch",
        total: int | None = None,
        progress: bool | str | None = None,
    ) -> None:
        from tqdm.auto import tqdm  # not at the top: lists and help show no progress

        self._items, self._title, self._unit, self._done = items, desc, unit, 0
        self._total = len(items) if total is None and isinstance(items, Sized) else total
        shown = _is_shown(progress)
        draws = shown and (_in_notebook() or sys.stderr.isatty())
        self._bar = tqdm(total=self._total, desc=desc, unit=unit, leave=False, disable=not draws, delay=_DELAY)
        self._writes = shown and not draws
        self._start = self._written = time.monotonic()

    def __iter__(self) -> Iterator[Item]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def update(self, steps: int = 1) -> None:
        """Count ``steps`` more as done."""
        self._done += steps
        self._bar.update(steps)
        self._write_line()
        if (listener := _LISTENER.get()) is not None:
            listener(self._title, self._done, self._total)

    def note(self, text: str) -> None:
        """Show a text after the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def wait(self) -> None:
        """Show that the work goes on, although no step is done."""
        self._bar.refresh()
        self._write_line()

    def _write_line(self) -> None:
        now = time.monotonic()
        if not self._writes or now - self._written < _EVERY:
            return
        self._written, taken = now, now - self._start
        line = f"{self._title}: "
        if self._unit:
            steps = "batches" if self._unit == "batch" else f"{self._unit}s"
            line += f"{self._done} of {self._total} {steps}, " if self._total else f"{self._done} {steps}, "
        line += f"{self._bar.format_interval(taken)} so far"
        if self._total and self._done:
            line += f", {self._bar.format_interval(taken / self._done * max(0, self._total - self._done))} left"
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Bar[Item]:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()


@contextmanager
def working(desc: str, progress: bool | None = None) -> Iterator[None]:
    """Show that work goes on whose steps nobody counts, such as loading a model.

    Args:
        desc: What is being done.
        progress: As for :class:`Bar`.
    """
    if not _is_shown(progress):
        yield
        return
    done = threading.Event()
    with Bar[object](desc=desc, unit="", progress=progress) as bar:
        bar._bar.bar_format = "{desc}: {elapsed}"

        def tick() -> None:
            while not done.wait(1):
                bar.wait()

        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            yield
        finally:
            done.set()
            ticker.join()


@contextmanager
def showing_progress() -> Iterator[None]:
    """Show the progress of everything within that is not told otherwise, as the command line does."""
    token = _SHOWN.set(True)
    try:
        yield
    finally:
        _SHOWN.reset(token)


def _is_shown(progress: bool | str | None) -> bool:
    if _HIDDEN.get():
        return False
    return _SHOWN.get() or is_interactive() if progress is None else bool(progress)


def is_interactive() -> bool:
    """Whether somebody works in a notebook, in IPython or at Python's prompt."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive) or "get_ipython" in vars(builtins)


def _in_notebook() -> bool:
    """Whether the output is that of a notebook: its streams are no terminals, and show bars all the same."""
    shell = getattr(builtins, "get_ipython", None)
    return shell is not None and shell().__class__.__name__ == "ZMQInteractiveShell"
