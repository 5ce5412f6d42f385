"""Extractive question answering, as SQuAD judges it (Rajpurkar et al. 2016, arXiv:1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_prune.errors import DataError
from hf_prune.evaluation.data.checks import check_texts
from hf_prune.evaluation.examples.base import Columns, ExampleKind, choose_column
from hf_prune.evaluation.examples.metrics import ANSWERS, Metric

_LONGEST_ANSWER = 30  # tokens
_CANDIDATES = 20  # starts and ends that are tried
_OVERLAP = 128  # tokens that neighbouring windows of a long text share, at most
_MOST_ROWS = 32  # windows in a forward pass


class QuestionAnswering(ExampleKind):
    """Questions on texts, with the answers that are right; none of them where the text has no answer.

    A text that is longer than the model reads is read in windows that overlap by up to 128 tokens, and the likeliest
    answer of all windows counts. Calibration takes the window in which the first right answer is.
    """

    name = "question-answering"
    metrics: ClassVar[Mapping[str, Metric]] = ANSWERS

    def columns(self, available: Sequence[str], where: str, texts: Sequence[str] | None, label: str | None) -> Columns:
        """Columns of questions, of texts and of answers: texts, or as in SQuAD."""
        named = list(texts or (None, None))
        if len(named) != 2:
            raise DataError(f"{len(named)} columns of texts are named: expected two, of the question and of the text")
        question = choose_column(available, where, named[0], ("question", "query"), "text_column")
        context = choose_column(available, where, named[1], ("context", "passage", "text"), "text_column")
        answers = choose_column(available, where, label, ("answers", "answer"), "label_column")
        return Columns((question, context), answers)

    def encode(
        self, model: Any, reader: Any, rows: Sequence[Mapping[str, Any]], columns: Columns, longest: int
    ) -> list[dict[str, Any]]:
        """Windows of question and text, where each token is in the text, and the first answer as a span."""
        if not getattr(reader, "is_fast", False):
            raise DataError(f"{type(reader).__name__} does not say where a token is: expected a fast tokenizer")
        for name in columns.inputs:
            check_texts([row[name] for row in rows], name, "the data set")
        right = [_answers(row[columns.label]) for row in rows]
        may_lack = any(not any(map(normal, answers)) for answers, _ in right)
        examples = []
        for number, (row, (answers, starts)) in enumerate(zip(rows, right, strict=True), start=1):
            question, context = (row[name] for name in columns.inputs)
            encoded = _windows(reader, question, context, longest, number)
            places = [
                [span if side == 1 else None for span, side in zip(part.offsets, part.sequence_ids, strict=True)]
                for part in encoded.encodings
            ]
            begin = (starts[0] if starts else context.find(answers[0])) if answers else -1
            spans = [_span(window, begin, begin + len(answers[0])) if begin >= 0 else (0, 0) for window in places]
            best = max(range(len(spans)), key=lambda i: spans[i][1] - spans[i][0] + (spans[i] != (0, 0)))
            names = [name for name in encoded if name in reader.model_input_names]
            windows = [{name: encoded[name][i] for name in names} for i in range(len(places))]
            kept = {"windows": windows, "places": places, "context": context}
            examples.append(
                {
                    "inputs": windows[best],
                    "labels": spans[best],
                    **kept,
                    "answers": answers,
                    "may_lack_answer": may_lack,
                }
            )
        return examples

    def collate(
        self, model: Any, reader: Any, examples: Sequence[Mapping[str, Any]], labels: bool
    ) -> dict[str, Tensor]:
        """As one batch, with the first and last token of the answers."""
        batch = super().collate(model, reader, examples, False)
        for i, name in enumerate(("start_positions", "end_positions")) if labels else ():
            batch[name] = torch.tensor([example["labels"][i] for example in examples])
        return batch

    def scored_batch(self, model: Any, reader: Any, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """All windows of all examples, in their order."""
        return super().collate(
            model, reader, [{"inputs": x} for example in examples for x in example["windows"]], False
        )

    def answer(self, model: Any, reader: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The logits of the starts and ends of answers, (windows, tokens) each."""
        parts: dict[str, list[Tensor]] = {"start_logits": [], "end_logits": []}
        for start in range(0, len(batch["input_ids"]), _MOST_ROWS):
            rows = {name: x[start : start + _MOST_ROWS] for name, x in batch.items()}
            outputs = super().answer(model, reader, rows)
            for name, kept in parts.items():
                logits = getattr(outputs, name, None)
                if not isinstance(logits, Tensor):
                    raise DataError(f"{type(model).__name__} returns no {name}: expected those of answers")
                kept.append(logits.float().cpu())
        return {name: torch.cat(kept) for name, kept in parts.items()}

    def judge(
        self, model: Any, reader: Any, outputs: Any, examples: Sequence[Mapping[str, Any]]
    ) -> list[Sequence[float]]:
        """Exact match and F1 of words, with the best of the right answers."""
        starts, ends = iter(outputs["start_logits"]), iter(outputs["end_logits"])
        rows: list[Sequence[float]] = []
        for example in examples:
            windows = [(next(starts), next(ends), places) for places in example["places"]]
            said = _best(windows, example["context"], example["may_lack_answer"])
            right = example["answers"] or [""]
            rows.append([max(float(normal(said) == normal(a)) for a in right), max(word_f1(said, a) for a in right)])
        return rows


def _windows(reader: Any, question: str, context: str, longest: int, number: int) -> Any:
    """A question with each window of a text, encoded."""
    asked = len(reader(question, add_special_tokens=False)["input_ids"])
    room = longest - asked - reader.num_special_tokens_to_add(pair=True)
    if room < 1:
        raise DataError(
            f"row {number}: the question has {asked:,} tokens, which leaves no room for its text in {longest:,}: "
            f"expected a shorter one, or a larger max_length"
        )
    return reader(
        question,
        context,
        truncation="only_second",
        max_length=longest,
        stride=min(_OVERLAP, room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def _best(windows: Sequence[tuple[Tensor, Tensor, Sequence[Any]]], context: str, may_lack: bool) -> str:
    """The likeliest span of the text; in data with questions without answer, the empty text if none is as likely.

    The first token says that there is no answer in a window, as models for SQuAD 2.0 learn it (Devlin et al. 2019,
    arXiv:1810.04805); of several windows, the one that says so least counts. Of SQuAD 1.1 every question has an
    answer, and a span is always said.

    Args:
        windows: Logits of starts and of ends, (tokens,) each, and where each token is in the text, for each window.
        context: The text.
        may_lack: Whether there may be no answer.
    """
    found = [(score, place) for window in windows for score, place in _likeliest(*window)]
    none = min(float(start[0] + end[0]) for start, end, _ in windows)
    if not found or (may_lack and none > max(found)[0]):
        return ""
    _, (begin, end) = max(found)
    return context[begin:end]


def _likeliest(start: Tensor, end: Tensor, places: Sequence[Any]) -> list[tuple[float, tuple[int, int]]]:
    """The likeliest span of a window with its score, or nothing."""
    usable = torch.tensor([place is not None for place in places])
    start, end = (x[: len(places)].masked_fill(~usable, -torch.inf) for x in (start, end))
    count = min(_CANDIDATES, int(usable.sum()))
    spans = [
        (float(start[a] + end[b]), (places[a][0], places[b][1]))
        for a in start.topk(count).indices.tolist()
        for b in end.topk(count).indices.tolist()
        if a <= b < a + _LONGEST_ANSWER
    ]
    return [max(spans)] if spans else []


def _span(places: Sequence[Any], begin: int, end: int) -> tuple[int, int]:
    inside = [i for i, place in enumerate(places) if place is not None and place[0] < end and place[1] > begin]
    return (inside[0], inside[-1]) if inside else (0, 0)


def _answers(value: Any) -> tuple[list[str], list[int]]:
    """Right answers and where they start, from a text, a list of texts, or a dict as in SQuAD."""
    if isinstance(value, Mapping):
        return list(value.get("text", ())), list(value.get("answer_start", ()))
    return ([value] if isinstance(value, str) else list(value or ())), []


def normal(text: str) -> str:
    """A text without case, punctuation, articles and extra space."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def word_f1(said: str, right: str) -> float:
    """F1 of the words of two texts."""
    ours, theirs = normal(said).split(), normal(right).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * common / (len(ours) + len(theirs))
