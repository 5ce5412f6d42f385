"""Whether the classes of a model are those of the data."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_prune.evaluation.data.checks import column
from hf_prune.utils.formatting import first_few

if TYPE_CHECKING:
    from datasets import Dataset

_UNNAMED = re.compile(r"(?:label ?)?(\d*)")  # what classes are called that nobody has named


def class_doubt(dataset: Dataset, label_column: str, labels: Sequence[int], config: Any) -> str:
    """How the classes of data and model differ, as far as their number and their names tell; empty if they do not.

    Args:
        dataset: The data.
        label_column: The column of the labels.
        labels: Its class numbers.
        config: Of the model.
    """
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    pairs = set(zip(column(dataset, label_column), labels, strict=True))
    said = sorted((name, number) for name, number in pairs if isinstance(name, str))
    for name, number in said:
        if _folded(names.get(number, name)) != _folded(name):
            return f"class {number} is {name!r} in the model's label2id, and {names[number]!r} in its id2label"
    if said:
        return ""
    there = getattr(dataset.features[label_column], "names", None)
    count = len(set(labels)) if there is None else len(there)
    if count != config.num_labels:
        which = f", of which {first_few(sorted(set(labels)), 5)} occur" if there is None else ""
        return f"the model has {config.num_labels} classes, and the data {count}{which}"
    theirs, ours = [_folded(name) for name in there or ()], [_folded(names.get(i, "")) for i in range(count)]
    plain = [_numbered(side) for side in (theirs, ours)]  # True: the names are but the numbers of the classes
    if there is None or plain in ([True, True], [True, None], [None, True]):
        return ""
    for number, name in enumerate(theirs):
        alike = [own for own in ours if own.startswith(name) or name.startswith(own)]  # "neg" is "negative"
        if name != ours[number] and (name in ours or alike != [ours[number]]):
            return f"class {number} is {names.get(number)!r} to the model, and {there[number]!r} in the data"
    return ""


def _folded(name: str) -> str:
    """A name as it is compared: in any case and width, with one kind of space between words."""
    text = unicodedata.normalize("NFKC", name).casefold().strip()
    return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", text)


def _numbered(names: Sequence[str]) -> bool | None:
    """Whether numbers that stand for names are those of the classes, from 0 or from 1; None if they are real names."""
    found = [match[1] for name in names if (match := _UNNAMED.fullmatch(name))]
    if len(found) < len(names):
        return None
    return any(all(text in ("", str(i + first)) for i, text in enumerate(found)) for first in (0, 1))
