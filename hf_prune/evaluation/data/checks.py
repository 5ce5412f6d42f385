"""Check that the columns of a data set hold texts and labels."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_prune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def check_columns(dataset: Dataset, columns: Sequence[str], where: str) -> None:
    """Make sure that a data set has some columns.

    Raises:
        DataError: If one is missing; the message lists those that are there.
    """
    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        raise DataError(
            f"{where} has no column {', '.join(map(repr, missing))} (found: {', '.join(dataset.column_names)}): "
            "name the columns with text_columns and label_column"
        )


@contextmanager
def rows_named(source: str | os.PathLike[str], split: str) -> Iterator[None]:
    """Within this context, errors that begin with a row say whose it is.

    Args:
        source: The file, folder or Hub id of the data, whose rows are counted as they are there.
        split: The split, if it has several.
    """
    try:
        yield
    except DataError as error:
        row, colon, rest = str(error).partition(":")
        if not re.fullmatch(r"row [\d,]+(, \w+ \d+)?", row):
            raise
        name = os.fspath(source)
        where = repr(name) if os.path.isfile(name) else f"split {split!r} of {name!r}"
        raise DataError(f"{row} of {where}{colon}{rest}") from error


def column(dataset: Dataset, name: str) -> list[Any]:
    """One column as a list of plain Python values, whatever the format of the data set."""
    return list(dataset.with_format(None)[name][:])


def check_texts(texts: list[Any], name: str, where: str) -> None:
    """Make sure that all values of a column are texts.

    Raises:
        DataError: At the first row that is not a text.
    """
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise DataError(f"row {number} of {where}: {name!r} is {text!r}, expected text")


def check_labels(labels: list[Any], name: str, where: str) -> list[int] | list[str]:
    """Labels as integers, or as strings if the first one is a string that is not an integer.

    Raises:
        DataError: If a label is missing, is written another way than the first one, or the data is unlabelled.
    """
    integers = _is_number(labels[0]) or not isinstance(labels[0], str)
    checked: list[Any] = []
    for number, label in enumerate(labels, start=1):
        integer = _as_integer(label)
        if label is None or label == "":
            raise DataError(f"row {number} of {where}: {name!r} is empty, expected a label: fill it in or drop the row")
        if integers and integer is None:
            hint = "; a column of numbers to predict (regression) has no classes" if _is_number(label) else ""
            raise DataError(
                f"row {number} of {where}: label {label!r} is not an integer: repair or drop that row{hint}"
            )
        if not integers and (integer is not None or not isinstance(label, str)):
            raise DataError(
                f"row {number} of {where}: label {label!r} is a number, but row 1 has the string {labels[0]!r}: "
                "write all labels the same way"
            )
        checked.append(integer if integers else label)
    if integers and min(checked) < 0:
        _raise_unlabelled(checked, where)
    return checked


def _as_integer(label: Any) -> int | None:
    """A class number, also if it is written as 1.0, as tables with gaps do; None if it is not one."""
    if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
        return int(label)
    match = re.fullmatch(r"(-?[0-9]+)(\.0+)?", label.strip()) if isinstance(label, str) else None
    return int(match[1]) if match else None


def _is_number(label: Any) -> bool:
    try:
        return math.isfinite(float(label))
    except (TypeError, ValueError):
        return False


def _raise_unlabelled(labels: list[int], where: str) -> None:
    if max(labels) < 0:
        raise DataError(
            f"{where} is unlabelled (every label is {labels[0]}), as the test splits of GLUE are, and cannot be "
            "scored: use a labelled split (train, validation)"
        )
    row, label = next((row, label) for row, label in enumerate(labels, start=1) if label < 0)
    raise DataError(f"row {row} of {where}: label {label} is negative, expected 0 or more: drop unlabelled rows")
