"""Models that write a text for a text, judged by ROUGE-L (Lin 2004)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_prune.calibration.batches import IGNORED
from hf_prune.errors import DataError
from hf_prune.evaluation.examples.base import Columns, ExampleKind, choose_column
from hf_prune.evaluation.examples.metrics import TEXTS, Metric

_LONGEST_TARGET = 128  # tokens
_SOURCES = ("document", "article", "source", "input", "text", "question", "en")
_TARGETS = ("summary", "highlights", "target", "output", "label", "labels", "answer", "de")


class TextGeneration(ExampleKind):
    """Texts, and what should be written for each; the likeliest token is taken each time."""

    name = "text-generation"
    metrics: ClassVar[Mapping[str, Metric]] = TEXTS

    def columns(self, available: Sequence[str], where: str, texts: Sequence[str] | None, label: str | None) -> Columns:
        """A column of texts and one of targets."""
        source = choose_column(available, where, texts[0] if texts else None, _SOURCES, "text_column")
        return Columns((source,), choose_column(available, where, label, _TARGETS, "label_column"))

    def encode(
        self, model: Any, reader: Any, rows: Sequence[Mapping[str, Any]], columns: Columns, longest: int
    ) -> list[dict[str, Any]]:
        """Tokens of both texts."""
        examples = []
        for number, row in enumerate(rows, start=1):
            source, target = row[columns.inputs[0]], row[columns.label]
            if not isinstance(source, str) or not isinstance(target, str):
                raise DataError(f"row {number}: found {source!r:.40} and {target!r:.40}: expected two texts")
            encoded = reader(source, truncation=True, max_length=longest)
            labels = reader(text_target=target, truncation=True, max_length=min(longest, _LONGEST_TARGET))["input_ids"]
            inputs = {name: encoded[name] for name in encoded if name in reader.model_input_names}
            examples.append({"inputs": inputs, "labels": labels, "target": target})
        return examples

    def collate(
        self, model: Any, reader: Any, examples: Sequence[Mapping[str, Any]], labels: bool
    ) -> dict[str, Tensor]:
        """As one batch; padding of the targets has no label."""
        batch = super().collate(model, reader, examples, False)
        takes = inspect.signature(model.forward).parameters
        batch = {name: value for name, value in batch.items() if name in takes}
        if labels:
            width = max(len(example["labels"]) for example in examples)
            padded = [[*example["labels"], *[IGNORED] * (width - len(example["labels"]))] for example in examples]
            batch["labels"] = torch.tensor(padded)
        return batch

    def answer(self, model: Any, reader: Any, batch: Mapping[str, Tensor]) -> Any:
        """The tokens that the model writes."""
        try:
            return model.generate(**batch, max_new_tokens=_LONGEST_TARGET, num_beams=1, do_sample=False)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{type(model).__name__} cannot write a text: {error}") from error

    def judge(
        self, model: Any, reader: Any, outputs: Any, examples: Sequence[Mapping[str, Any]]
    ) -> list[Sequence[float]]:
        """Exact match, and ROUGE-L."""
        said = reader.batch_decode(outputs, skip_special_tokens=True)
        pairs = zip(said, (example["target"] for example in examples), strict=True)
        return [[float(a.strip() == b.strip()), rouge_l(a, b)] for a, b in pairs]


def rouge_l(said: str, right: str) -> float:
    """F1 of the longest common subsequence of words, without case and without stemming.

    Example:
        >>> rouge_l("the cat sat", "The cat has sat.")
        0.8571428571428571
    """
    ours, theirs = (re.findall(r"\w+", text.lower()) for text in (said, right))
    if not ours or not theirs:
        return float(ours == theirs)
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0
        for place, other in enumerate(theirs, start=1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return 2 * row[-1] / (len(ours) + len(theirs))
