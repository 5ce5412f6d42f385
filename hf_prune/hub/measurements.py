"""Scores and timings from files: what they must contain, and which weights they were measured on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_prune.errors import DataError
from hf_prune.hub.plausibility import check_fact
from hf_prune.utils.json_files import read_json_object

# By field of PruningCardData: the key that must be there, and the command that prints it.
MEASURED = {
    "evaluation": ("evaluation", "hf-prune evaluate"),
    "latency": ("points", "hf-prune bench"),
    "acceleration": ("kinds", "hf-prune accelerate"),
}

# By a field that only one kind of score has: the numbers that it must have.
_NUMBERS = {
    "perplexity": ("perplexity",),
    "metric": ("value", "standard_error", "n"),
    "accuracy": ("accuracy", "standard_error", "n"),
}


def read_measurement(key: str, value: Any, weights: str | None, folder: Path) -> dict[str, Any]:
    """Scores or timings that a card can show, measured on the weights beside it.

    Args:
        key: One of ``MEASURED``.
        value: What the command printed with ``--json``, or the path of a file with it.
        weights: The digest of the folder's weights; None if it has none.
        folder: The checkpoint, for messages.

    Raises:
        DataError: If numbers are missing or cannot be true, if they were measured on other weights, or if a file does
            not say on which.
    """
    is_file = isinstance(value, str | Path)
    inner, command = MEASURED[key]
    measured = read_json_object(value, DataError, f"what {command} --json printed") if is_file else value
    part = measured.get(inner) if isinstance(measured, Mapping) else None
    if key == "evaluation" and isinstance(part, Mapping):
        numbers = next((names for kind, names in _NUMBERS.items() if kind in part), _NUMBERS["accuracy"])
        complete = all(isinstance(part.get(name), int | float) for name in numbers)
    else:
        complete = key != "evaluation" and isinstance(part, list | tuple)
    where = value if is_file else f"{key}={str(value)[:60]}"
    if not complete:
        raise DataError(f"{where} is not what {command} --json printed: it has no {inner!r} with its numbers")
    check_fact(key, measured, str(where))
    digests = measured_digests(measured)
    if weights is not None and weights not in digests and (digests or is_file):
        problem = f"was measured on other weights than those of {folder}"
        if not digests:
            problem = f"does not say that it was measured on the weights of {folder}"
        raise DataError(f"{where} {problem}: run {command} again, on this folder")
    return {name: part for name, part in measured.items() if name != "accelerations"}  # which no card shows


def measured_digests(measured: Mapping[str, Any]) -> list[str]:
    """The digests of the weights that scores or timings name, without the dense model that timings begin with."""
    digests = measured.get("weights")
    if "points" not in measured:
        return [digests] if isinstance(digests, str) else []
    if not isinstance(digests, Mapping):
        return []
    names = list(dict.fromkeys(point["model"] for point in measured["points"]))
    return [digest for name in names[len(names) > 1 :] if isinstance(digest := digests.get(name), str)]
