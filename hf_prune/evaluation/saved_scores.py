"""What all scores have in common: what their data is called, and how they are read back from a file."""

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
