"""Classifiers of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_prune.calibration.columns import is_image
from hf_prune.calibration.labels import label_numbers
from hf_prune.errors import DataError
from hf_prune.evaluation.examples.base import Columns, ExampleKind, choose_column, class_distributions, logits_of
from hf_prune.evaluation.examples.metrics import CLASSES, Metric, constant_answers
from hf_prune.utils.column_names import LABELS


class ImageClassification(ExampleKind):
    """Images, and one class of several."""

    name = "image-classification"
    metrics: ClassVar[Mapping[str, Metric]] = CLASSES
    reads_media = True

    def guesses(self, rows: Any) -> list[Any]:
        """Each of the commonest classes."""
        return constant_answers(rows)

    def columns(self, available: Sequence[str], where: str, texts: Sequence[str] | None, label: str | None) -> Columns:
        """One column of images and one of labels."""
        named = texts[0] if texts else None
        image = choose_column(available, where, named, ("image", "img", "pixel_values"), "text_column")
        return Columns((image,), choose_column(available, where, label, LABELS, "label_column"))

    def check(self, model: Any, reader: Any) -> None:
        """Nothing to check before images are read."""

    def longest(self, model: Any, reader: Any, wanted: int | None) -> int:
        """Images have no tokens."""
        return 0

    def encode(
        self, model: Any, reader: Any, rows: Sequence[Mapping[str, Any]], columns: Columns, longest: int
    ) -> list[dict[str, Any]]:
        """Pixels are read when a batch is made: all at once would not fit."""
        name = columns.inputs[0]
        for number, row in enumerate(rows, start=1):
            if not is_image(row[name]):
                raise DataError(f"row {number}: {name!r} is a {type(row[name]).__name__}: expected an image")
        labels = label_numbers(
            [row[columns.label] for row in rows], model.config.label2id or {}, model.config.num_labels
        )
        return [{"inputs": row[name], "labels": label} for row, label in zip(rows, labels, strict=True)]

    def collate(
        self, model: Any, reader: Any, examples: Sequence[Mapping[str, Any]], labels: bool
    ) -> dict[str, Tensor]:
        """As the processor makes them."""
        images = [example["inputs"].convert("RGB") for example in examples]
        batch = {name: x for name, x in reader(images, return_tensors="pt").items() if isinstance(x, Tensor)}
        return batch if not labels else {**batch, "labels": torch.tensor([example["labels"] for example in examples])}

    def judge(
        self, model: Any, reader: Any, outputs: Any, examples: Sequence[Mapping[str, Any]]
    ) -> list[Sequence[float]]:
        """The class with the highest logit, and the true one."""
        said = logits_of(outputs, model, 2).argmax(-1).tolist()
        return [[float(a), float(example["labels"])] for a, example in zip(said, examples, strict=True)]

    def distributions(self, model: Any, outputs: Any) -> Tensor:
        """The log-probabilities of the classes."""
        return class_distributions(model, outputs)
