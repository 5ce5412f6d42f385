"""What all scores have in common: what their data is called, and how they are written to a file and read back."""

from __future__ import annotations

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
