"""Calibration data as people have it, read into batches: the one place that knows in which forms it may come."""

from __future__ import annotations

import itertools
import logging
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_prune.calibration.columns import batches_of_columns, is_image, is_sound
from hf_prune.calibration.conversations import is_conversation
from hf_prune.calibration.processors import forward_names
from hf_prune.calibration.sentences import inputs_of_model, sentence_batches
from hf_prune.errors import CalibrationError, DataError
from hf_prune.utils.wrapping import is_sentence_model, sole_model, without_wrappers

CalibrationData = Any  # see :func:`read_calibration`
EXPECTED = (
    "expected a list of texts, a datasets.Dataset, a pandas.DataFrame, a DataLoader, one batch (a dict of the model's "
    "inputs), or a list of batches"
)
MOST_ROWS = 512  # of a data set that are read
_log = logging.getLogger(__name__)


def read_calibration(
    model: nn.Module, data: Any, tokenizer: Any = None, *, labels: bool = False
) -> list[Mapping[str, Any]] | None:
    """Calibration data as a list of batches, dicts with the inputs of a model.

    Args:
        model: The model that will run them.
        data: One of these, or None:

            * a list of texts, of pairs of texts, of conversations (lists of messages with ``role`` and ``content``,
              which the tokenizer's chat template writes out), of images (PIL) or of sounds (dicts with ``array`` and
              ``sampling_rate``, as ``datasets`` gives them);
            * a ``datasets.Dataset`` or a ``pandas.DataFrame`` with texts, conversations (a column ``messages`` or
              ``conversations``), images, sounds or tokens; of more than 512 rows, 512 drawn at random;
            * a ``DataLoader``;
            * one batch, a dict of tensors as tokenizers and processors return it, or one tensor of the main input;
            * batches: a list or any other iterable of these.
        tokenizer: The tokenizer or processor; None for the one beside the model, in the folder that it was loaded from.
        labels: Whether labels are needed.

    Returns:
        The batches; None if ``data`` is None.

    Raises:
        CalibrationError: If it is of another kind, or what reads it is missing.
        DataError: If a text is empty of use, or a label is not one of the model's.
    """
    if data is None:
        return None
    if is_sentence_model(holder := without_wrappers(model)):
        return _of_sentences(holder, data)
    inner = sole_model(model)
    assert isinstance(inner, nn.Module)

    def of_columns(columns: Mapping[str, Sequence[Any]]) -> list[Mapping[str, Any]]:
        return batches_of_columns(inner, columns, tokenizer, labels=labels)

    if isinstance(data, str):
        raise CalibrationError(f"calibration data is the text {data[:40]!r}: {EXPECTED}; [text] is a list of one")
    if isinstance(data, Tensor):
        return [_batch_of(inner, data)]
    if isinstance(data, Mapping):
        return _of_mapping(data, of_columns)
    if (columns := _columns_of_dataset(data)) is not None:
        return of_columns(columns)
    items = _listed(data)
    if not items:
        return []
    first = items[0]
    if any(isinstance(item, str) for item in items) or is_image(first) or is_sound(first):
        return of_columns({"data": items})
    if is_conversation(first):
        return of_columns({"messages": items})
    if isinstance(data, DataLoader) and _is_row_of_texts(first):
        return of_columns({"data": [text for batch in items for text in batch]})
    if _is_row_of_texts(first):
        return of_columns(_pairs(items))
    if isinstance(first, Mapping) and first and not any(isinstance(value, Tensor) for value in first.values()):
        return of_columns(_columns_of_rows(items))
    if isinstance(first, Mapping) and any(_is_row_of_texts(value) for value in first.values()):
        return of_columns(_joined_columns(items))  # of a DataLoader over texts
    return [_batch_of(inner, item) for item in items]


def _of_sentences(model: Any, data: Any) -> list[Mapping[str, Any]]:
    """Texts become batches as the model reads them, and features lose what is no input."""
    if isinstance(data, str):
        raise DataError(f"calibration data is the text {data[:40]!r}: expected a list of texts")
    if isinstance(data, Mapping) and any(isinstance(value, Tensor) for value in data.values()):
        return [inputs_of_model(data)]
    if (columns := _columns_of_dataset(data)) is not None:
        from hf_prune.calibration.columns import text_columns

        names = text_columns(columns)
        rows = list(zip(*(columns[name] for name in names), strict=True))
        crosses = hasattr(model, "predict")
        return [*sentence_batches(rows if crosses else list(itertools.chain(*rows)), model)]
    items = _listed(data)
    if items and isinstance(items[0], str | Sequence):
        return [*sentence_batches(items, model)]
    return [inputs_of_model(item) if isinstance(item, Mapping) else item for item in items]


def _of_mapping(data: Mapping[str, Any], of_columns: Any) -> list[Mapping[str, Any]]:
    if any(isinstance(value, Tensor) for value in data.values()):
        return [data]
    if data and all(hasattr(value, "column_names") for value in data.values()):
        raise CalibrationError(
            f"calibration data is a {type(data).__name__} of {', '.join(map(str, data))}: expected one split, such as "
            f"data[{next(iter(data))!r}]"
        )
    if data and all(isinstance(value, list | tuple) for value in data.values()):
        found: list[Mapping[str, Any]] = of_columns(data)
        return found
    raise CalibrationError(
        f"calibration data is a {type(data).__name__} of {', '.join(map(str, data)) or 'nothing'} without tensors: "
        f"{EXPECTED}; return_tensors='pt' makes tensors"
    )


def _columns_of_dataset(data: Any) -> Mapping[str, Sequence[Any]] | None:
    """The rows of a table of ``datasets`` or pandas that are read, by column; None if it is something else."""
    if _is_data_frame(data):
        drawn = _drawn_rows(len(data))
        rows = data if drawn is None else data.iloc[drawn]
        return {str(name): rows[name].tolist() for name in rows.columns}
    if not hasattr(data, "column_names") or not hasattr(data, "features"):
        return None
    if not hasattr(data, "__len__"):  # streamed
        rows = list(itertools.islice(data, MOST_ROWS))
        return _columns_of_rows(rows) if rows else {}
    drawn = _drawn_rows(len(data))
    plain = (data if drawn is None else data.select(drawn)).with_format(None)
    return {name: list(plain[name]) for name in data.column_names}


def _is_data_frame(data: Any) -> bool:
    """Whether this is a table of pandas, which iterates over the names of its columns."""
    return type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "columns")


def _drawn_rows(count: int) -> list[int] | None:
    """The rows of a table that are read; None for all."""
    if count <= MOST_ROWS:
        return None
    _log.info("Calibrating on %d of %d rows, drawn at random; pass fewer rows to choose them.", MOST_ROWS, count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MOST_ROWS].tolist()


def _columns_of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = list(rows[0])
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or list(row) != names:
            held = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise CalibrationError(
                f"row {number} of the calibration data has {held}, and row 0 {', '.join(names)}: expected rows that "
                f"are alike"
            )
    return {name: [row[name] for row in rows] for name in names}


def _joined_columns(batches: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    joined: dict[str, list[Any]] = {name: [] for name in batches[0]}
    for batch in batches:
        for name, values in batch.items():
            joined[name] += values.tolist() if isinstance(values, Tensor) else list(values)
    return joined


def _pairs(items: Sequence[Any]) -> dict[str, list[str]]:
    for number, item in enumerate(items):
        if not _is_row_of_texts(item) or len(item) != 2:
            raise CalibrationError(f"item {number} of the calibration data is {item!r:.80}: expected a pair of texts")
    return {"first": [item[0] for item in items], "second": [item[1] for item in items]}


def _is_row_of_texts(item: object) -> bool:
    return isinstance(item, list | tuple) and len(item) > 0 and all(isinstance(part, str) for part in item)


def _listed(data: Any) -> list[Any]:
    try:
        items: Iterable[Any] = iter(data)
    except TypeError as error:
        hint = "call it first, and pass what it returns" if callable(data) else EXPECTED
        raise CalibrationError(
            f"calibration data is {reprlib.repr(data)}, of type {type(data).__name__}: {hint}"
        ) from error
    return list(items)


def _batch_of(model: nn.Module, item: Any) -> Mapping[str, Any]:
    """One batch: a dict as it is, or the main input as a tensor, alone or with a tensor of labels."""
    if isinstance(item, Mapping):
        return item
    parts = [item] if isinstance(item, Tensor) else item
    is_pair = isinstance(parts, list | tuple) and 0 < len(parts) <= 2 and all(isinstance(p, Tensor) for p in parts)
    if not is_pair or (len(parts) == 2 and parts[1].dim() != 1):
        raise CalibrationError(
            f"a calibration batch is a {type(item).__name__}: expected a dict of the model's inputs, a tensor of its "
            f"main input, or that with a tensor of labels; {EXPECTED}"
        )
    name = getattr(model, "main_input_name", "input_ids")
    if name not in forward_names(model):
        raise CalibrationError(
            f"a calibration batch is a {type(item).__name__}: expected a dict of model inputs, since "
            f"{type(model).__name__} does not say which of them a tensor is"
        )
    return {name: parts[0], **({"labels": parts[1]} if len(parts) == 2 else {})}
