"""Progress of long loops: a bar on a terminal, and calls of a listener."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")
Listener = Callable[[str, int, "int | None"], object]

_LISTENER: ContextVar[Listener | None] = ContextVar("hf_prune_progress", default=None)


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
    """A progress bar, to iterate over or to update by hand.

    Args:
        items: What to iterate over; nothing if :meth:`update` is called by hand.
        desc: What is being done.
        unit: The name of a step.
        total: The number of steps, if ``items`` has no length.
        progress: Show a bar if the output is a terminal.
    """

    def __init__(
        self,
        items: Iterable[Item] = (),
        *,
        desc: str,
        unit: str = "batch",
        total: int | None = None,
        progress: bool = False,
    ) -> None:
        self._items, self._title, self._done = items, desc, 0
        self._total = len(items) if total is None and isinstance(items, Sized) else total
        # tqdm takes disable=None as: show it on a terminal only
        self._bar = tqdm(total=self._total, desc=desc, unit=unit, leave=False, disable=None if progress else True)

    def __iter__(self) -> Iterator[Item]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def update(self, steps: int = 1) -> None:
        """Count ``steps`` more as done."""
        self._done += steps
        self._bar.update(steps)
        if (listener := _LISTENER.get()) is not None:
            listener(self._title, self._done, self._total)

    def note(self, text: str) -> None:
        """Show a text after the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def __enter__(self) -> Bar[Item]:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()
