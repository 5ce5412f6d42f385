"""Checks of single numbers and texts among the facts of a card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hf_prune.errors import DataError

ROUNDING = 0.005  # error of a number written with two decimal places
NEAR = 1e-6  # what sums in another order may differ by
_MOST_CHARACTERS = 4_000  # of a name or a path


def are_texts(values: Mapping[str, Any], *names: str) -> None:
    """Check that values are lines of text, where they are there.

    Raises:
        DataError: If one is not.
    """
    for name in names:
        value = values.get(name)
        if value is not None and (
            not isinstance(value, str) or len(value) > _MOST_CHARACTERS or not value.isprintable()
        ):
            raise DataError(f"{name} is {value!r:.60}: expected one line of at most {_MOST_CHARACTERS:,} characters")


def is_same(name: str, claimed: float, counted: float, what: str, tolerance: float = ROUNDING) -> None:
    """Check that a number is what others give.

    Args:
        name: Of the number.
        claimed: The number.
        counted: What it should be.
        what: What gives that, for the message.
        tolerance: The largest difference.

    Raises:
        DataError: If it is not.
    """
    if abs(claimed - counted) > tolerance:
        raise DataError(f"{name} is {claimed!r}, and {what} {counted:.6g}: measure again")


def around(name: str, interval: Any, value: float) -> None:
    """Check that an interval is two numbers with a value between them.

    Raises:
        DataError: If it is not.
    """
    if type(interval) not in (list, tuple) or len(interval) != 2:
        raise DataError(f"{name} is {interval!r:.60}: expected two numbers")
    low, high = interval
    if not low - NEAR <= value <= high + NEAR:
        raise DataError(f"{name} is {[low, high]!r}: expected one around {value:g}")


def whole(values: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int:
    """A whole number within bounds.

    Raises:
        DataError: If it is not.
    """
    value = values[name]
    if type(value) is not int or value < low or (high is not None and value > high):
        end = "or more" if high is None else f"to {high:,}"
        raise DataError(f"{name} is {value!r}: expected a whole number, {low:,} {end}")
    return value


def real(values: Mapping[str, Any], name: str, low: float, high: float = math.inf, *, open_: bool = False) -> float:
    """A finite number within bounds, which it may reach unless they are ``open_``.

    Raises:
        DataError: If it is not.
    """
    value = values[name]
    inside = type(value) in (int, float) and math.isfinite(value)
    if not inside or not (low < value < high if open_ else low <= value <= high):
        end = (
            f"from {low:g} to {high:g}" if math.isfinite(high) else f"above {low:g}" if open_ else f"of {low:g} or more"
        )
        raise DataError(f"{name} is {value!r}: expected a number {end}")
    return float(value)
