"""How far a long loop has come: a bar on a terminal, and a function that wants to know."""

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
    """Within this context, tell a function how far every long loop of hf_prune is.

    What the function raises ends the loop: a pruning then changes nothing, as after any other error. It is called in
    the thread that opened the context.

    Args:
        listener: Gets what is being done, such as ``"Calibrating"``, how many steps of it are done, and how many there
            are, or None if that is not known.

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
    """Steps of a loop, to iterate over or to count by hand.

    Args:
        items: What to iterate over; none if :meth:`update` is called.
        desc: What is being done.
        unit: What a step is.
        total: How many there are, if ``items`` do not tell.
        progress: Whether a terminal shows a bar.
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
        # None: shown on a terminal
        self._bar = tqdm(total=self._total, desc=desc, unit=unit, leave=False, disable=None if progress else True)

    def __iter__(self) -> Iterator[Item]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def update(self, steps: int = 1) -> None:
        """So many more are done."""
        self._done += steps
        self._bar.update(steps)
        if (listener := _LISTENER.get()) is not None:
            listener(self._title, self._done, self._total)

    def note(self, text: str) -> None:
        """Something to be shown behind the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def __enter__(self) -> Bar[Item]:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()
