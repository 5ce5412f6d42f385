"""The result of verifying a card: what it claims beside what was counted."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from hf_prune.utils.formatting import format_table
from hf_prune.utils.results import Result

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Difference:
    """One fact of a card.

    Args:
        name: What the fact is called.
        claimed: Its value in the card.
        counted: Its value as counted in the files.
        tolerance: Largest difference of two numbers that are taken to be the same.
        is_claim: Whether the files do not show it, so that ``counted`` only repeats what the author says elsewhere.
    """

    name: str
    claimed: Any
    counted: Any
    tolerance: float = 0.0
    is_claim: bool = False

    @property
    def is_same(self) -> bool:
        """Whether the card is right."""
        if self.tolerance and isinstance(self.claimed, int | float) and isinstance(self.counted, int | float):
            return abs(self.claimed - self.counted) <= self.tolerance
        return bool(_to_json(self.claimed) == _to_json(self.counted))  # NaN equals NaN as text

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, under the keys that ``hf-prune verify --json`` has always had."""
        return {
            "name": self.name,
            "said": _to_json(self.claimed),
            "found": _to_json(self.counted),
            "tolerance": self.tolerance,
            "claimed": self.is_claim,
        }


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """A card compared with its files. ``print(verification)`` shows it as a table.

    Args:
        source: The folder or repository.
        facts: All facts of the card.
        claims: What else the card says, which cannot be counted in the files.
    """

    source: str
    facts: tuple[Difference, ...]
    claims: tuple[str, ...] = ()

    @property
    def is_right(self) -> bool:
        """Whether every fact is right."""
        return all(fact.is_same for fact in self.facts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "source": self.source,
            "is_right": self.is_right,
            "facts": [fact.to_dict() for fact in self.facts],
            "claims": list(self.claims),
        }

    def __str__(self) -> str:
        rows = [
            [
                fact.name,
                show_value(fact.claimed),
                "" if fact.is_claim and fact.is_same else show_value(fact.counted),
                _verdict(fact),
            ]
            for fact in self.facts
        ]
        wrong = sum(not fact.is_same for fact in self.facts)
        end = f"{wrong} of {len(self.facts)} facts of the card are wrong." if wrong else "What was counted is right."
        claims = f"\nNot counted, since files do not tell: {', '.join(self.claims)}." if self.claims else ""
        return f"{format_table(['fact', 'card', 'counted', ''], rows, left=1)}\n{end}{claims}"


def _verdict(fact: Difference) -> str:
    return "DIFFERENT" if not fact.is_same else "claimed" if fact.is_claim else ""


def _to_json(value: Any) -> Any:
    """A value from YAML for JSON, which has no NaN, no dates and only texts as keys."""
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    infinite = isinstance(value, float) and not math.isfinite(value)
    return value if not infinite and (value is None or isinstance(value, bool | int | float | str)) else str(value)


def show_value(value: Any) -> str:
    """A value as tables show it: digits grouped, checksums cut."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value[:16]}…" if isinstance(value, str) and _SHA256.fullmatch(value) else str(value)
