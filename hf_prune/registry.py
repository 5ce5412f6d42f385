"""Registries for the axes that users extend: criteria and granularities.

An entry is one file with one decorator. A registry imports its package the first time it is asked,
so a new file in ``hf_prune/criteria/`` is found without a central list.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Generic, TypeVar

from hf_prune.errors import UnknownNameError

if TYPE_CHECKING:
    from hf_prune.criteria.base import Criterion
    from hf_prune.granularities.base import Granularity

T = TypeVar("T")


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> UnknownNameError:
    """The error for a name that does not exist, with the valid ones and the closest of them."""
    valid = list(valid)
    close = difflib.get_close_matches(str(name), valid, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UnknownNameError(f"unknown {kind} {name!r}: expected one of {', '.join(valid)}.{hint}")


class Registry(Generic[T]):
    """Classes by name.

    Args:
        kind: What an entry is, for messages.
        package: The package whose modules hold the entries; imported at the first look-up.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, type[T]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that adds an entry.

        Raises:
            ValueError: If the name is taken; nothing is ever replaced silently.
        """

        def add(entry: type[T]) -> type[T]:
            if name in self._entries:
                raise ValueError(
                    f"{self.kind} {name!r} is already registered by "
                    f"{self._entries[name].__module__}: choose another name"
                )
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> type[T]:
        """The entry called ``name``.

        Raises:
            UnknownNameError: If there is none; the message lists the valid names.
        """
        self._load()
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise unknown_name(self.kind, name, self.names()) from None

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        self._load()
        return tuple(sorted(self._entries))

    def _load(self) -> None:
        if not self._loaded:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._loaded = True


CRITERIA: Registry[Criterion] = Registry("criterion", "hf_prune.criteria")
GRANULARITIES: Registry[Granularity] = Registry("granularity", "hf_prune.granularities")


def parse_granularity(text: object) -> Granularity:
    """The granularity that ``text`` spells, such as ``"unstructured"``, ``"2:4"`` or ``"block:16x1"``.

    Raises:
        UnknownNameError: If no registered granularity reads it.
        ConfigError: If one reads it but the numbers in it make no sense.
    """
    entries = [GRANULARITIES.get(name) for name in GRANULARITIES.names()]
    if isinstance(text, str):
        for entry in entries:
            if (granularity := entry.parse(text)) is not None:
                return granularity
    raise unknown_name("granularity", text, [entry.usage for entry in entries])
