"""Whether a model and data have the same classes, judged by their number and names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_prune.evaluation.data.checks import column
from hf_prune.utils.formatting import first_few

if TYPE_CHECKING:
    from datasets import Dataset

_UNNAMED = re.compile(r"(?:label ?)?(\d*)")  # default names of classes


def class_doubt(dataset: Dataset, label_column: str, labels: Sequence[int], config: Any) -> str:
    """How the classes of data and model differ, judged by their number and names; empty if they do not seem to.

    Args:
        dataset: The data.
        label_column: The column of the labels.
        labels: The labels as class numbers.
        config: The model's config.

    Returns:
        The first difference, in words.
    """
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    pairs = set(zip(column(dataset, label_column), labels, strict=True))
    named = sorted((name, number) for name, number in pairs if isinstance(name, str))
    for name, number in named:
        if _folded(names.get(number, name)) != _folded(name):
            return f"class {number} is {name!r} in the model's label2id, and {names[number]!r} in its id2label"
    if named:  # string labels were looked up in label2id, so only id2label could contradict them
        return ""
    data_names = getattr(dataset.features[label_column], "names", None)
    count = len(set(labels)) if data_names is None else len(data_names)
    if count != config.num_labels:
        which = f", of which {first_few(sorted(set(labels)), 5)} occur" if data_names is None else ""
        return f"the model has {config.num_labels} classes, and the data {count}{which}"
    of_data, of_model = [_folded(name) for name in data_names or ()], [_folded(names.get(i, "")) for i in range(count)]
    numbered = [_numbered(side) for side in (of_data, of_model)]  # True: the names are just the classes' numbers
    if data_names is None or numbered in ([True, True], [True, None], [None, True]):
        return ""
    for number, name in enumerate(of_data):
        alike = [other for other in of_model if other.startswith(name) or name.startswith(other)]  # "neg", "negative"
        if name != of_model[number] and (name in of_model or alike != [of_model[number]]):
            return f"class {number} is {names.get(number)!r} to the model, and {data_names[number]!r} in the data"
    return ""


def _folded(name: str) -> str:
    """A name normalized for comparison: case, width, and the separator between words do not matter."""
    text = unicodedata.normalize("NFKC", name).casefold().strip()
    return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", text)


def _numbered(names: Sequence[str]) -> bool | None:
    """Whether names are just the classes' numbers, from 0 or from 1; None if they are real names."""
    digits = [match[1] for name in names if (match := _UNNAMED.fullmatch(name))]
    if len(digits) < len(names):
        return None
    return any(all(text in ("", str(i + first)) for i, text in enumerate(digits)) for first in (0, 1))
