"""Labels as class numbers of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_prune.errors import DataError

_DIGITS = re.compile(r"(\d+)(?:\.0+)?")


def label_numbers(labels: Sequence[Any], label2id: Mapping[str, int], num_labels: int | None) -> list[int]:
    """Class numbers, checked against the model's classes if their number is known; case does not matter in names.

    Where classes have digits as names, such as "1" to "5", labels are names if all of them are, and else numbers.

    Args:
        labels: Class numbers, or names of classes: all of the data, since a part may look like names by chance.
        label2id: The class numbers by name, as in ``model.config.label2id``.
        num_labels: The number of classes, if it is known.

    Raises:
        DataError: If a label is not one of the classes.
    """
    by_folded_name: dict[str, set[int]] = {}
    for name, number in label2id.items():
        by_folded_name.setdefault(str(name).strip().casefold(), set()).add(int(number))
    are_names = all(_as_name(label) in by_folded_name for label in labels)
    ids = []
    for row, label in enumerate(labels, start=1):
        digits = _DIGITS.fullmatch(label.strip()) if isinstance(label, str) else None
        if digits and not are_names:  # of a file in which all is text
            label = int(digits[1])
        elif are_names or isinstance(label, str):
            label = str(label)
            matches = by_folded_name.get(label.strip().casefold(), set())
            if label not in label2id and len(matches) != 1:
                known = ", ".join(map(repr, label2id)) or "none"
                raise DataError(
                    f"row {row}: label {label!r} is not in label2id (known: {known}): use those names, or class "
                    "numbers, in the data"
                )
            else:
                label = label2id.get(label, next(iter(matches)))
        if not isinstance(label, int) or label < 0 or (num_labels is not None and label >= num_labels):
            limit = "0 or more" if num_labels is None else f"0 to {num_labels - 1}"
            hint = "; numbers to predict (regression) have no accuracy" if isinstance(label, float) else ""
            raise DataError(
                f"row {row}: label {label!r} is not a class, expected {limit}: drop or renumber such rows{hint}"
            )
        ids.append(int(label))
    return ids


def label_rows(
    rows: Sequence[Sequence[Any]], label2id: Mapping[str, int], num_labels: int | None, part: str
) -> list[list[int]]:
    """Class numbers of rows that have several labels each; arguments as of :func:`label_numbers`.

    Args:
        rows: The labels of each row.
        label2id: The class numbers by name.
        num_labels: The number of classes, if it is known.
        part: What has a label, such as a word, for messages.

    Raises:
        DataError: If a label is not one of the classes; the message has its row, and its place in the row.
    """
    places = [(row, place) for row, labels in enumerate(rows, start=1) for place in range(1, len(labels) + 1)]
    try:
        numbers = iter(label_numbers([label for labels in rows for label in labels], label2id, num_labels))
    except DataError as error:
        counted, _, rest = str(error).removeprefix("row ").partition(":")
        row, place = places[int(counted) - 1]
        raise DataError(f"row {row}, {part} {place}:{rest}") from error
    return [[next(numbers) for _ in labels] for labels in rows]


def _as_name(label: object) -> str | None:
    """A label as the folded name of a class that it may be."""
    return str(label).strip().casefold() if isinstance(label, str | int) else None
