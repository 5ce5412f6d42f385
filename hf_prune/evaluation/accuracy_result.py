"""The accuracy of a model, with the data and settings that it was measured with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_prune.errors import DataError
from hf_prune.evaluation.divergence import read_distributions, stored_rows
from hf_prune.evaluation.saved_scores import check_counted, check_fields, data_name
from hf_prune.utils.results import Result

_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("split", "source", "data_fingerprint", "dtype", "classes"), (str,)),
    **dict.fromkeys(("max_length", "batch_size"), (int,)),
    "seconds": (float, int),
}
_TYPE_NAMES = {str: "a text", int: "a whole number, 0 or more", float: "a number, 0 or more"}


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """How many examples of a data set a model classifies right.

    Attributes:
        accuracy: Share of right predictions, 0 to 1.
        n: Number of examples.
        standard_error: Of the accuracy, ``sqrt(p (1 - p) / n)``, 0 to 0.5.
        predictions: Predicted class of each example, in the order of the data.
        labels: True class of each example, in the order of the data.
        split: Name of the split.
        source: Where the data came from.
        data_fingerprint: Hash of texts and labels, see ``evaluation.data.loading.fingerprint``.
        seconds: Wall time of tokenizing and predicting.
        dtype: Of the weights, such as ``float32``.
        max_length: Longer inputs were cut to this many tokens.
        batch_size: Examples per forward pass.
        classes: How the classes of the model and of the data seem to differ, in words; empty if they do not.
        distributions: The log-probabilities of each example's classes, as
            :func:`hf_prune.evaluation.divergence.pack_rows` writes them; empty in scores of earlier versions.
    """

    bars = ("accuracy",)

    accuracy: float
    n: int
    standard_error: float
    predictions: tuple[int, ...]
    labels: tuple[int, ...]
    split: str
    source: str
    data_fingerprint: str
    seconds: float
    dtype: str
    max_length: int
    batch_size: int
    classes: str = ""
    distributions: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """What the score is called where there are several kinds."""
        return "accuracy"

    @property
    def value(self) -> float:
        """The score: the accuracy, 0 to 1."""
        return self.accuracy

    def __str__(self) -> str:
        """One line: accuracy and standard error in percent, n, and the data."""
        data = data_name(self)
        return f"accuracy {100 * self.accuracy:.2f} % ± {100 * self.standard_error:.2f} (n = {self.n}, {data})"

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON; no distributions where they are more than 200,000 numbers (n times classes)."""
        lists = {name: list(getattr(self, name)) for name in ("predictions", "labels")}
        return {**asdict(self), **lists, "distributions": stored_rows(self.distributions)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """The inverse of ``to_dict``; the accuracy is computed again from the predictions.

        Raises:
            DataError: If a field is missing or unknown, or a number is not what the predictions give.
        """
        check_fields(cls, values, "evaluation", optional=("classes", "distributions"))
        for name, types in _TYPES.items():
            value = values.get(name, "")
            if type(value) not in types or (str not in types and not 0 <= value < 1e15):
                raise DataError(f"not a saved evaluation: {name} is {value!r}: expected {_TYPE_NAMES[types[0]]}")
        for name in ("predictions", "labels"):
            if not isinstance(values[name], (list, tuple)):
                raise DataError(f"not a saved evaluation: {name} is {values[name]!r}: expected a list of class numbers")
        predictions, labels = tuple(values["predictions"]), tuple(values["labels"])
        if not all(type(number) is int and number >= 0 for number in (*predictions, *labels)):
            raise DataError("not a saved evaluation: predictions and labels must be class numbers, 0 or more")
        if not 0 < len(labels) == len(predictions):
            raise DataError(f"not a saved evaluation: {len(predictions)} predictions of {len(labels)} labels")
        counted = share_correct(predictions, labels)
        check_counted(values, counted, "the predictions that are saved with it give", 1e-9)
        distributions = read_distributions(values, len(labels), predictions)
        lists = {"predictions": predictions, "labels": labels, "distributions": distributions}
        return cls(**{**values, **counted, **lists})


def share_correct(predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float | int]:
    """The share of right predictions, how many there are, and the standard error of the share."""
    n = len(labels)
    p = sum(a == b for a, b in zip(predictions, labels, strict=True)) / n
    return {"accuracy": p, "n": n, "standard_error": math.sqrt(p * (1 - p) / n)}
