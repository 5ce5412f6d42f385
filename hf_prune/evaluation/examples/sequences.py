"""Sequence classifiers: one class of several, several labels at once, or a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from hf_prune.calibration.labels import label_numbers, label_rows
from hf_prune.errors import DataError
from hf_prune.evaluation.data.checks import check_texts
from hf_prune.evaluation.data.columns import find_text_columns
from hf_prune.evaluation.examples.base import Columns, ExampleKind, choose_column, class_distributions, logits_of
from hf_prune.evaluation.examples.metrics import CLASSES, LABELS, NUMBERS, Metric, constant_answers
from hf_prune.utils.column_names import LABELS as USUAL


class _Sequences(ExampleKind):
    """Texts, or pairs of texts, and what is said of each."""

    usual: ClassVar[Sequence[str]] = USUAL

    def columns(self, available: Sequence[str], where: str, texts: Sequence[str] | None, label: str | None) -> Columns:
        """One column of texts or two, and one of labels."""
        inputs = tuple(texts) if texts else find_text_columns(available, where)
        for name in inputs:
            choose_column(available, where, name, (), "text_column")
        return Columns(inputs, choose_column(available, where, label, self.usual, "label_column"))

    def encode(
        self, model: Any, reader: Any, rows: Sequence[Mapping[str, Any]], columns: Columns, longest: int
    ) -> list[dict[str, Any]]:
        """Tokens, and the label as :meth:`read_label` gives it."""
        sides = [[row[name] for row in rows] for name in columns.inputs]
        for name, texts in zip(columns.inputs, sides, strict=True):
            check_texts(texts, name, "the data set")
        encoded = reader(*sides, truncation=True, max_length=longest)
        names = [name for name in encoded if name in reader.model_input_names]
        labels = self.read_labels(model, [row[columns.label] for row in rows])
        return [
            {"inputs": {name: encoded[name][i] for name in names}, "labels": label} for i, label in enumerate(labels)
        ]

    def read_labels(self, model: Any, labels: Sequence[Any]) -> list[Any]:
        """Labels as a loss takes them.

        Raises:
            DataError: If one is of no use.
        """
        raise NotImplementedError

    def judge(
        self, model: Any, reader: Any, outputs: Any, examples: Sequence[Mapping[str, Any]]
    ) -> list[Sequence[float]]:
        """What was said, and what is true."""
        said = self.say(logits_of(outputs, model, 2))
        return [[*row, *_as_row(example["labels"])] for row, example in zip(said, examples, strict=True)]

    def say(self, logits: Tensor) -> list[list[float]]:
        """What logits (batch, labels) say."""
        raise NotImplementedError


class Classification(_Sequences):
    """One class of several."""

    name = "classification"
    metrics: ClassVar[Mapping[str, Metric]] = CLASSES

    def guesses(self, rows: Any) -> list[Any]:
        """Each of the commonest classes."""
        return constant_answers(rows)

    def read_labels(self, model: Any, labels: Sequence[Any]) -> list[int]:
        """Class numbers."""
        return label_numbers(labels, model.config.label2id or {}, model.config.num_labels)

    def say(self, logits: Tensor) -> list[list[float]]:
        """The class with the highest logit."""
        return [[float(c)] for c in logits.argmax(-1).tolist()]

    def distributions(self, model: Any, outputs: Any) -> Tensor:
        """The log-probabilities of the classes."""
        return class_distributions(model, outputs)


class MultiLabel(_Sequences):
    """Any number of labels: a column of lists of names or numbers, or of lists of 0 and 1 for each label."""

    name = "multi-label-classification"
    metrics: ClassVar[Mapping[str, Metric]] = LABELS
    several_labels = True

    def guesses(self, rows: Any) -> list[Any]:
        """The commonest label, the two commonest, and so on; and none."""
        true = rows[:, rows.shape[1] // 2 :]
        places = np.argsort(np.argsort(-true.mean(0), kind="stable"))
        return [np.hstack([np.tile(places < number, (len(true), 1)), true]) for number in range(true.shape[1] + 1)]

    def read_labels(self, model: Any, labels: Sequence[Any]) -> list[list[float]]:
        """For each label 0 or 1."""
        known, count = model.config.label2id or {}, model.config.num_labels
        read = [_parts(value, number) for number, value in enumerate(labels, start=1)]
        flags = all(len(parts) == count and set(parts) <= {0, 1} for parts in read)
        if flags:
            return [[float(bit) for bit in parts] for parts in read]
        bits = []
        for numbers in label_rows(read, known, count, "label"):
            chosen = [0.0] * count
            for number in numbers:
                chosen[number] = 1.0
            bits.append(chosen)
        return bits

    def say(self, logits: Tensor) -> list[list[float]]:
        """Labels with a probability above one half."""
        bits: list[list[float]] = (logits > 0).float().tolist()
        return bits

    def distributions(self, model: Any, outputs: Any) -> Tensor:
        """The logits of the labels."""
        return logits_of(outputs, model, 2)


class Regression(_Sequences):
    """A number."""

    name = "regression"
    metrics: ClassVar[Mapping[str, Metric]] = NUMBERS
    usual = ("score", "label", "labels", "target", "similarity", "rating")

    def read_labels(self, model: Any, labels: Sequence[Any]) -> list[float]:
        """Numbers."""
        numbers = []
        for row, label in enumerate(labels, start=1):
            try:
                number = float(label)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise DataError(f"row {row}: label {label!r} is not a number: repair or drop that row")
            numbers.append(number)
        if len(set(numbers)) < 2:
            raise DataError(f"all {len(numbers)} rows have the label {numbers[0]:g}: expected labels that differ")
        return numbers

    def say(self, logits: Tensor) -> list[list[float]]:
        """The logit."""
        return [[float(x)] for x in logits[:, 0].tolist()]

    def collate(
        self, model: Any, reader: Any, examples: Sequence[Mapping[str, Any]], labels: bool
    ) -> dict[str, Tensor]:
        """As one batch, with numbers in the model's precision."""
        batch = super().collate(model, reader, examples, labels)
        return batch if not labels else {**batch, "labels": batch["labels"].to(model.dtype)}


def _parts(value: Any, row: int) -> list[Any]:
    """The labels in a cell: a list, or a text with commas between them."""
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("[] ").split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        raise DataError(f"row {row}: label {value!r} is not a list of labels, nor a text with commas between them")
    return [int(part) if isinstance(part, str) and part.isdigit() else part for part in value]


def _as_row(label: Any) -> list[float]:
    return [float(x) for x in label] if isinstance(label, list | tuple) else [float(label)]
