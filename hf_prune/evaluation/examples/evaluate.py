"""Score a model on a data set, example by example."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_prune.errors import DataError
from hf_prune.evaluation.data.loading import fingerprint
from hf_prune.evaluation.divergence import pack_rows
from hf_prune.evaluation.examples.base import Columns, ExampleKind
from hf_prune.evaluation.examples.kinds import find_kind, kind_of_model
from hf_prune.evaluation.examples.score import ExampleScore, summarise
from hf_prune.planning.checks import check_positive
from hf_prune.pruning.mask_store import warn_regrown
from hf_prune.utils.forward import device_of, eval_mode
from hf_prune.utils.progress import Bar

if TYPE_CHECKING:
    from datasets import Dataset


def evaluate_examples(
    model: Any,
    reader: Any,
    dataset: Dataset,
    *,
    kind: str | None = None,
    metric: str | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    source: str = "",
    split: str = "",
    progress: bool | str | None = None,
) -> ExampleScore:
    """Measure how well a model does its task, on the device and in the dtype it has.

    By default the task is the one that the model's class is for, and the metric the first of it: accuracy, F1, macro F1
    or Matthews' correlation of classes (texts and images); F1 of several labels; Spearman's or Pearson's correlation of
    numbers; F1 of entities (token classification); F1 and exact match of answers; ROUGE-L of texts that are written.

    Args:
        model: The model.
        reader: Its tokenizer, or its processor of images.
        dataset: What to score it on.
        kind: The kind of task, one of ``hf_prune.evaluation.examples.kinds.KINDS``.
        metric: Such as ``"f1"``, ``"matthews"``, ``"spearman"``.
        text_columns: What the model reads; None for columns with usual names.
        label_column: What it should say; the same.
        batch_size: Examples per forward pass.
        max_length: Longer inputs are cut to this many tokens; by default what tokenizer and model allow, at most 512.
        source: Where the data came from, for the record.
        split: Its split, for the record.
        progress: Show a progress bar on a terminal; a string is its title.

    Returns:
        The score, with what it is made of.

    Raises:
        ConfigError: If a setting is out of range, or there is no such kind or metric.
        DataError: If a column is missing, a row is of no use, or the model is of another kind or returns NaN.

    Example:
        >>> print(evaluate_examples(model, tokenizer, data, metric="matthews"))  # doctest: +SKIP
        Matthews 0.5312 ± 0.0273 (n = 1,043, data 3df74fb1e67a1618)
    """
    check_positive("batch_size", batch_size)
    task = find_kind(kind or _kind_of(model))
    task.metric(metric)
    name = metric or next(iter(task.metrics))
    warn_regrown(model, "what is scored is not the model that save_pretrained() writes, in which they are zero")
    if len(dataset) < task.least_rows:
        raise DataError(f"the data set has {len(dataset)} rows: expected at least two, to say how sure a score is")
    columns = task.columns(dataset.column_names, "the data set", text_columns, label_column)
    task.check(model, reader)
    longest = task.longest(model, reader, max_length)
    start = time.perf_counter()
    examples = task.encode(model, reader, _rows(dataset, columns), columns, longest)
    rows, distributions = _judged(task, model, reader, examples, batch_size, progress)
    return ExampleScore(
        kind=task.name,
        name=name,
        **summarise(task.name, name, rows),
        kept=tuple(rows),
        split=split,
        source=source,
        data_fingerprint=data_fingerprint(task, dataset, columns),
        seconds=time.perf_counter() - start,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        max_length=longest,
        batch_size=batch_size,
        distributions=tuple(distributions),
    )


def data_fingerprint(task: ExampleKind, dataset: Dataset, columns: Columns) -> str:
    """A hash of what a model reads and should say; of images, of their files' names or bytes."""
    if not task.reads_media:
        return fingerprint(dataset, columns.names)
    from datasets import Image

    plain = dataset.cast_column(columns.inputs[0], Image(decode=False))
    return fingerprint(plain, columns.names)


def encoded_examples(
    task: ExampleKind, model: Any, reader: Any, dataset: Dataset, columns: Columns
) -> list[dict[str, Any]]:
    """The examples of a data set, encoded; see :meth:`ExampleKind.encode`."""
    longest = task.longest(model, reader, None)
    return task.encode(model, reader, _rows(dataset, columns), columns, longest)


def _kind_of(model: Any) -> str:
    name = type(model).__name__
    kind = kind_of_model(name, model.config.to_dict())
    if kind is None:
        raise DataError(f"{name} is for none of the tasks that are scored by example: name one with kind=")
    return kind


def _rows(dataset: Dataset, columns: Columns) -> list[dict[str, Any]]:
    return list(dataset.with_format(None).select_columns(columns.names))


def _judged(
    task: ExampleKind,
    model: Any,
    reader: Any,
    examples: list[dict[str, Any]],
    batch_size: int,
    progress: bool | str | None,
) -> tuple[list[tuple[float, ...]], list[str]]:
    """What is kept of each example, and what is predicted for it, in the order of the data.

    Examples of about the same length share a batch. There are no predictions where the kind has no distributions.
    """

    def size(i: int) -> int:
        inputs = examples[i]["inputs"]
        return len(inputs["input_ids"]) if isinstance(inputs, dict) else 0

    order = sorted(range(len(examples)), key=lambda i: -size(i))
    rows: list[tuple[float, ...]] = [()] * len(examples)
    predicted: dict[int, str] = {}
    device, title = device_of(model), progress if isinstance(progress, str) else "Scoring"
    with eval_mode(model), torch.inference_mode():
        for start in Bar(range(0, len(order), batch_size), desc=title, progress=progress):
            part = order[start : start + batch_size]
            chosen = [examples[i] for i in part]
            batch = {n: x.to(device) for n, x in task.scored_batch(model, reader, chosen).items()}
            outputs = task.answer(model, reader, batch)
            judged, distributions = task.judge(model, reader, outputs, chosen), task.distributions(model, outputs)
            for i, row in zip(part, judged, strict=True):
                rows[i] = tuple(map(float, row))
            if distributions is not None:
                predicted |= zip(part, pack_rows(distributions), strict=True)
    return rows, [predicted[i] for i in sorted(predicted)]
