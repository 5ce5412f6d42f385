"""The kinds of units, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_prune.utils.registry import Registry

if TYPE_CHECKING:
    from hf_prune.architectures.kinds.base import UnitKind

KINDS: Registry[UnitKind] = Registry("kind of unit", "hf_prune.architectures.kinds")


def all_kinds() -> list[UnitKind]:
    """Every kind, in the order in which they are listed."""
    kinds = [KINDS.get(name)() for name in KINDS.names()]
    return sorted(kinds, key=lambda kind: kind.position)


def kind_named(name: str) -> UnitKind:
    """The kind with a name.

    Raises:
        UnknownNameError: If there is none; the message lists the valid names.
    """
    return KINDS.get(name)()


def unit_descriptions() -> dict[str, str]:
    """Kinds that ``granularity=`` takes, with their descriptions, in the order in which they are listed."""
    return {kind.name: kind.description for kind in all_kinds() if kind.is_granularity}
