"""Why something found in a model stays, and of which kind it would be."""

from __future__ import annotations

from collections.abc import Collection, Mapping


class Refusal(str):
    """A sentence that says why something cannot be removed.

    Args:
        reason: The sentence.
        kind: The kind of unit that stays; empty if it may be any.
    """

    kind: str

    def __new__(cls, reason: str, kind: str = "") -> Refusal:
        """Make a sentence that knows what it is about."""
        refusal = super().__new__(cls, reason)
        refusal.kind = kind
        return refusal


def reasons_for(kinds: Collection[str], refused: Mapping[str, str]) -> list[str]:
    """What holds back units of some kinds, by name; first what surely is about them, and nothing about others."""
    about = {name: getattr(reason, "kind", "") for name, reason in refused.items()}
    names = [name for name, kind in about.items() if kind in kinds] + [name for name, kind in about.items() if not kind]
    return [f"{name}: {refused[name]}" for name in names]
