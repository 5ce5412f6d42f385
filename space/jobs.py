"""Who has something long running: one job for each visitor and, on a public Space, for each address."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hf_prune import ConfigError


class Jobs:
    """The jobs that are running now.

    Args:
        public: Whether strangers visit, so that jobs are counted by address too.
    """

    def __init__(self, *, public: bool) -> None:
        self._public = public
        self._cancelled: dict[str, threading.Event] = {}  # by visitor
        self._addresses: set[str] = set()
        self._lock = threading.Lock()

    @contextmanager
    def run(self, visitor: str) -> Iterator[threading.Event]:
        """A visitor's job, of which there is one at a time; yields an event that is set when it is cancelled.

        Raises:
            ConfigError: If another job of this visitor is running.
        """
        cancelled = threading.Event()
        with self._lock:
            if visitor in self._cancelled:
                raise ConfigError("something of yours is still running: wait for it, or cancel it")
            self._cancelled[visitor] = cancelled
        try:
            yield cancelled
        finally:
            with self._lock:
                del self._cancelled[visitor]

    @contextmanager
    def take_turn(self, address: str | None) -> Iterator[None]:
        """On a public Space, let one visitor at an address run something long at a time: there are few places.

        Args:
            address: Where the visitor is; None if that is not known.

        Raises:
            ConfigError: If something is running for this address.
        """
        if not self._public or address is None:
            yield
            return
        with self._lock:
            if address in self._addresses:
                raise ConfigError(
                    "something is still running for your address, in this window or another one, yours or that of "
                    "somebody who shares it: wait for it, or cancel it"
                )
            self._addresses.add(address)
        try:
            yield
        finally:
            with self._lock:
                self._addresses.discard(address)

    def cancel(self, visitor: str) -> bool:
        """Stop what a visitor has running; returns whether there was anything."""
        with self._lock:
            cancelled = self._cancelled.get(visitor)
        if cancelled is not None:
            cancelled.set()
        return cancelled is not None

    def visitors(self) -> list[str]:
        """Visitors who have a job."""
        with self._lock:
            return list(self._cancelled)
