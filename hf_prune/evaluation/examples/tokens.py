"""Token classifiers, judged by the entities that they find (Tjong Kim Sang and De Meulder 2003), as in seqeval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_prune.calibration.batches import IGNORED
from hf_prune.calibration.labels import label_rows
from hf_prune.errors import DataError
from hf_prune.evaluation.examples.base import Columns, ExampleKind, choose_column, logits_of
from hf_prune.evaluation.examples.metrics import ENTITIES, Metric


class TokenClassification(ExampleKind):
    """Lists of words, and a label for each; the first token of a word says its label."""

    name = "token-classification"
    metrics: ClassVar[Mapping[str, Metric]] = ENTITIES

    def columns(self, available: Sequence[str], where: str, texts: Sequence[str] | None, label: str | None) -> Columns:
        """One column of lists of words, one of lists of labels."""
        words = choose_column(available, where, texts[0] if texts else None, ("tokens", "words"), "text_column")
        usual = ("ner_tags", "tags", "labels", "label", "pos_tags", "chunk_tags")
        return Columns((words,), choose_column(available, where, label, usual, "label_column"))

    def encode(
        self, model: Any, reader: Any, rows: Sequence[Mapping[str, Any]], columns: Columns, longest: int
    ) -> list[dict[str, Any]]:
        """Tokens, labels of the first tokens of words, and -100 for the others."""
        if not getattr(reader, "is_fast", False):
            raise DataError(f"{type(reader).__name__} does not say which word a token is of: expected a fast tokenizer")
        examples = []
        pairs = [(_words(row[columns.inputs[0]]), _words(row[columns.label])) for row in rows]
        for number, (words, tags) in enumerate(pairs, start=1):
            if not words or len(words) != len(tags):
                raise DataError(
                    f"row {number}: {len(words)} words with {len(tags)} labels: expected as many, at least one"
                )
        all_tags = label_rows([tags for _, tags in pairs], model.config.label2id or {}, model.config.num_labels, "word")
        for (words, _), numbers in zip(pairs, all_tags, strict=True):
            encoded = reader(words, is_split_into_words=True, truncation=True, max_length=longest)
            first: dict[int, int] = {}
            for place, word in enumerate(encoded.word_ids()):
                if word is not None:
                    first.setdefault(word, place)
            labels = [IGNORED] * len(encoded["input_ids"])
            for word, place in first.items():
                labels[place] = numbers[word]
            inputs = {name: encoded[name] for name in encoded if name in reader.model_input_names}
            examples.append({"inputs": inputs, "labels": labels, "true": numbers, "first": first})
        return examples

    def collate(
        self, model: Any, reader: Any, examples: Sequence[Mapping[str, Any]], labels: bool
    ) -> dict[str, Tensor]:
        """As one batch; padding has no label."""
        batch = super().collate(model, reader, examples, False)
        if labels:
            width = batch["input_ids"].shape[1]
            padded = [[*example["labels"], *[IGNORED] * (width - len(example["labels"]))] for example in examples]
            batch["labels"] = torch.tensor(padded)
        return batch

    def judge(
        self, model: Any, reader: Any, outputs: Any, examples: Sequence[Mapping[str, Any]]
    ) -> list[Sequence[float]]:
        """Entities that are right, found and there; labels that are right, and all. Words cut off are missed."""
        names = {int(number): str(name) for number, name in model.config.id2label.items()}
        outside = next((number for number, name in names.items() if name == "O"), 0)
        rows: list[Sequence[float]] = []
        for said, example in zip(logits_of(outputs, model, 3).argmax(-1).tolist(), examples, strict=True):
            found = [
                said[example["first"][w]] if w in example["first"] else outside for w in range(len(example["true"]))
            ]
            predicted, true = (entities([names[number] for number in tags]) for tags in (found, example["true"]))
            right = sum(a == b for a, b in zip(found, example["true"], strict=True))
            rows.append([float(len(predicted & true)), len(predicted), len(true), right, len(found)])
        return rows


def entities(labels: Sequence[str]) -> set[tuple[int, int, str]]:
    """The entities in labels such as ``B-PER``, ``I-PER`` and ``O``: first and last word, and type.

    One ends where another begins, the type changes, or ``O`` stands; labels without a prefix are types.

    Example:
        >>> sorted(entities(["B-PER", "I-PER", "O", "LOC", "LOC", "B-LOC"]))
        [(0, 1, 'PER'), (3, 4, 'LOC'), (5, 5, 'LOC')]
    """
    found, start, kind = set(), 0, ""
    for place, label in enumerate([*labels, "O"]):
        prefix, dash, rest = label.partition("-")
        kind_here = "" if label == "O" else (rest if dash and prefix in "BIESUL" else label)
        begins = bool(dash) and prefix in "BSU" and label != "O"
        if kind and (begins or kind_here != kind):
            found.add((start, place - 1, kind))
        if kind_here and (begins or kind_here != kind):
            start = place
        kind = kind_here
    return found


def _words(value: Any) -> list[Any]:
    """A cell with words: a list, or a text with spaces between them."""
    return value.split() if isinstance(value, str) else list(value or ())
