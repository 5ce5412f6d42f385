"""A visitor's pruned model, and the shelf of those of all visitors."""

from __future__ import annotations

import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from children import Child
from limits import Limits

from hf_prune import DataError, PruningConfig


@dataclass
class Session:
    """A visitor's pruned model: its process and folder, and what is shown of it."""

    child: Child
    model: Mapping[str, Any]
    folder: Path
    config: PruningConfig
    facts: Mapping[str, Any]
    labels: Sequence[str]
    removed_units: Mapping[str, int]  # by kind
    layers: Sequence[Sequence[int]] | None  # (now, before) of each list of layers
    histograms: Sequence[Mapping[str, Any]]
    units: Mapping[str, list[bool]]
    removed_shares: Mapping[str, float]  # by matrix
    reasons: Sequence[str]
    used: float = field(default_factory=time.monotonic)
    reading: threading.Lock = field(default_factory=threading.Lock)  # held while others read its folder
    measured: dict[str, Any] = field(default_factory=dict)  # what measuring.measure_both has given

    @property
    def name(self) -> str:
        """The dense model's name."""
        return str(self.model["name"])

    @property
    def memory(self) -> int:
        """Bytes it takes: the weights of both models, or what its process reports if that is more."""
        return max(self.child.memory, self.facts["memory_bytes_before"] + self.facts["memory_bytes"])

    @property
    def archive_folder(self) -> Path:
        """Where its zip file goes."""
        return self.folder.parent / f"{self.folder.name}-zip"

    def numbers(self) -> dict[str, Any]:
        """Everything that was counted and measured, ready for JSON."""
        names = ("evaluation", "agreement", "plain", "kernels", "latency")
        return {**self.facts, **{name: self.measured.get(name) for name in names}}

    def card_arguments(self, name: str) -> dict[str, Any]:
        """What its card is written from."""
        return {"name": name, **{what: self.measured.get(what) for what in ("latency", "evaluation")}}

    def remove(self) -> None:
        """End its process and delete its files, once nobody uses them."""
        with self.reading, self.child.turn:
            self.child.end()
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self.archive_folder, ignore_errors=True)


class Shelf:
    """The sessions of all visitors; those that were not used for long go, and the oldest where there is no room.

    Args:
        limits: How many there may be, how large and how old.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # by visitor, the most recently used one last
        self._changing = threading.RLock()

    def visitors(self) -> list[str]:
        """Visitors who have a session."""
        with self._changing:
            return list(self._sessions)

    def of(self, visitor: str) -> Session:
        """A visitor's session.

        Raises:
            DataError: If they have none, or no longer.
        """
        with self._changing:
            self.drop_idle()
            if visitor not in self._sessions:
                raise DataError(
                    f"there is no pruned model of yours: prune one first (it goes after "
                    f"{self.limits.idle_seconds / 60:.0f} minutes without use, or when many others come)"
                )
            session = self._sessions[visitor]
            session.used = time.monotonic()
            self._sessions.move_to_end(visitor)
            return session

    def keep(self, visitor: str, session: Session) -> None:
        """Keep a session in place of the one that the visitor had."""
        with self._changing:
            self.drop(visitor)
            self._sessions[visitor] = session
            self.drop_idle()

    def drop_idle(self) -> None:
        """Drop sessions that have been idle for too long, and those that there is no memory for."""
        with self._changing:
            now = time.monotonic()
            for visitor in [v for v, s in self._sessions.items() if now - s.used > self.limits.idle_seconds]:
                self.drop(visitor)
            while len(self._sessions) > 1 and (
                len(self._sessions) > self.limits.visitors
                or sum(session.memory for session in self._sessions.values()) > self.limits.kept_bytes
            ):
                self.drop(next(iter(self._sessions)))

    def drop(self, visitor: str, only: Session | None = None) -> None:
        """Drop a visitor's session, if it is still this one; None for whichever it is."""
        with self._changing:
            if only is not None and self._sessions.get(visitor) is not only:
                return
            session = self._sessions.pop(visitor, None)
        if session is not None and (session.child.turn.locked() or session.reading.locked()):  # in use: do not wait
            threading.Thread(target=session.remove, daemon=True).start()
        elif session is not None:
            session.remove()
