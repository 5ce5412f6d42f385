"""What a verification found."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from hf_prune.utils.formatting import format_table

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Difference:
    """One fact of a card.

    Args:
        name: Which one.
        said: What the card says.
        found: What was counted.
        tolerance: How far apart numbers may be.
        claimed: Whether files do not tell it, so that ``found`` is only what the author said elsewhere.
    """

    name: str
    said: Any
    found: Any
    tolerance: float = 0.0
    claimed: bool = False

    @property
    def is_same(self) -> bool:
        """Whether the card is right."""
        if self.tolerance and isinstance(self.said, int | float) and isinstance(self.found, int | float):
            return abs(self.said - self.found) <= self.tolerance
        return bool(_json(self.said) == _json(self.found))  # NaN is NaN


@dataclass(frozen=True)
class Verification:
    """A card beside what was counted. ``print(verification)`` shows it as a table.

    Args:
        source: The folder or repository.
        facts: All facts of the card.
        claims: What the card says besides, and nobody can count in the files.
    """

    source: str
    facts: tuple[Difference, ...]
    claims: tuple[str, ...] = ()

    @property
    def is_right(self) -> bool:
        """Whether every fact is."""
        return all(fact.is_same for fact in self.facts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "source": self.source,
            "is_right": self.is_right,
            "facts": [{key: _json(value) for key, value in vars(fact).items()} for fact in self.facts],
            "claims": list(self.claims),
        }

    def __str__(self) -> str:
        rows = [
            [
                fact.name,
                show_value(fact.said),
                "" if fact.claimed and fact.is_same else show_value(fact.found),
                _verdict(fact),
            ]
            for fact in self.facts
        ]
        wrong = sum(not fact.is_same for fact in self.facts)
        end = f"{wrong} of {len(self.facts)} facts of the card are wrong." if wrong else "What was counted is right."
        claims = f"\nNot counted, since files do not tell: {', '.join(self.claims)}." if self.claims else ""
        return f"{format_table(['fact', 'card', 'counted', ''], rows, left=1)}\n{end}{claims}"


def _verdict(fact: Difference) -> str:
    return "DIFFERENT" if not fact.is_same else "claimed" if fact.claimed else ""


def _json(value: Any) -> Any:
    """For JSON, which has neither NaN nor dates and keys of any kind: YAML has."""
    if isinstance(value, dict):
        return {str(key): _json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json(each) for each in value]
    infinite = isinstance(value, float) and not math.isfinite(value)
    return value if not infinite and (value is None or isinstance(value, bool | int | float | str)) else str(value)


def show_value(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value[:16]}…" if isinstance(value, str) and _SHA256.fullmatch(value) else str(value)
