"""What all scores have in common: what their data is called, and how they are written to a file and read back."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from hf_prune.errors import DataError


def data_name(score: Any) -> str:
    """What to call the data of a score: its source and split, or the fingerprint if it has neither."""
    return " ".join(part for part in (score.source, score.split) if part) or f"data {score.data_fingerprint}"


def check_fields(score: type[Any], values: Mapping[str, Any], name: str, optional: Collection[str] = ()) -> None:
    """Make sure that values have the fields of a score.

    Args:
        score: The dataclass of the score.
        values: What its ``to_dict`` is said to have returned.
        name: What to call the score in the message.
        optional: Fields that earlier versions did not write.

    Raises:
        DataError: If a field is missing or unknown.
    """
    names = {field.name for field in fields(score)}
    missing, unknown = names - {*optional, *values}, set(values) - names
    if missing or unknown:
        raise DataError(
            f"not a saved {name}: missing {sorted(missing)}, unknown {sorted(unknown)}: pass what "
            f"{score.__name__}.to_dict returned"
        )


def is_finite_number(number: object) -> bool:
    """Whether a value read from a file is an int or a float, no bool, and finite."""
    return type(number) in (int, float) and math.isfinite(number)  # type: ignore[arg-type]


def check_counted(values: Mapping[str, Any], counted: Mapping[str, Any], source: str, tolerance: float) -> None:
    """Make sure that values are those that are counted again.

    Args:
        values: What was saved.
        counted: What is counted, by the same names: numbers, or words.
        source: What they were counted from, with its verb, for messages.
        tolerance: Relative and absolute, of numbers.

    Raises:
        DataError: If one differs.
    """
    for name, right in counted.items():
        claimed = values[name]
        if isinstance(right, str):
            same = claimed == right
        else:
            same = is_finite_number(claimed) and math.isclose(claimed, right, rel_tol=tolerance, abs_tol=tolerance)
        if not same:
            raise DataError(f"{name} is {claimed!r}, but {source} {right!r}: the file was edited; measure again")


def check_error(values: Mapping[str, Any]) -> None:
    """Make sure that the standard error and the number of examples of a score can be true.

    Raises:
        DataError: If they cannot.
    """
    error, n = values["standard_error"], values["n"]
    if not is_finite_number(error) or error < 0 or type(n) is not int or n < 1:
        raise DataError(f"standard_error is {error!r} and n {n!r}: expected 0 or more, and a whole number above 0")


def scores_to_dict(score: Mapping[str, Any], dense: Mapping[str, Any], compared: Mapping[str, Any]) -> dict[str, Any]:
    """Scores and comparisons as plain values: those of ``"evaluation"`` at the top, the others under their names.

    Args:
        score: By name, of the model.
        dense: By name, of the dense model; empty if there is none.
        compared: By name, of both.
    """
    values: dict[str, Any] = {}
    for name in score:
        results = {"evaluation": score[name], "dense": dense.get(name), "comparison": compared.get(name)}
        part = {key: result.to_dict() for key, result in results.items() if result is not None}
        values |= part if name == "evaluation" else {name: part}
    return values
