"""Columns of raw data as batches: texts, conversations, images, sounds, and tokens that are not padded yet."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.conversations import conversation_column, conversation_tokens
from hf_prune.calibration.labels import label_numbers
from hf_prune.calibration.processors import find_processor, find_tokenizer, forward_names
from hf_prune.calibration.texts import context_length, padded_texts
from hf_prune.errors import CalibrationError, DataError
from hf_prune.planning.expectations import is_language_model
from hf_prune.utils.column_names import usual_column, usual_texts

BATCH_SIZE = 16
_LONGEST = 512  # tokens
_LABELS = ("labels", "label")


def batches_of_columns(
    model: nn.Module, columns: Mapping[str, Sequence[Any]], processor: Any = None, *, labels: bool = False
) -> list[Mapping[str, Any]]:
    """Batches of a model from the columns of a table.

    Args:
        model: The model.
        columns: Values by the name of the column, all of one length.
        processor: A tokenizer or a processor; None for the one beside the model.
        labels: Whether labels are needed: a column ``label`` or ``labels``, and of a language model the text itself.

    Raises:
        CalibrationError: If no column is of a kind that the model reads, or what reads it is missing.
        DataError: If a value or a label is of no use.
    """
    if not columns or not len(next(iter(columns.values()))):
        return []
    tags = _label_column(model, columns) if labels else None
    lacks_labels = labels and tags is None and "labels" in forward_names(model) and not _predicts_tokens(model)
    if is_tokens(columns):
        _refuse_if(lacks_labels, columns)
        return _of_tokens(model, columns, processor, tags, own=labels and _predicts_tokens(model))
    for test, what in ((is_image, "images"), (is_sound, "sounds")):
        for values in columns.values():
            if test(values[0]):
                _refuse_if(lacks_labels, columns)
                return _of_media(model, values, what, processor, tags)
    chats = conversation_column(columns)
    names = text_columns(columns) if chats is None else ()
    for name in names:
        _check_texts(columns[name])
    tokenizer = _with_padding(find_tokenizer(model, processor))
    _refuse_if(lacks_labels, columns)
    limits = (_LONGEST, tokenizer.model_max_length, context_length(model))
    longest = min(limit for limit in limits if limit is not None)
    if chats is not None:
        tokens = {"input_ids": conversation_tokens(columns[chats], tokenizer, longest)}
        return _of_tokens(model, tokens, tokenizer, tags, own=labels and _predicts_tokens(model))
    texts = [row[0] if len(row) == 1 else row for row in zip(*(columns[name] for name in names), strict=True)]
    batches: list[Mapping[str, Any]] = []
    for batch, rows in padded_texts(texts, tokenizer, batch_size=BATCH_SIZE, max_length=longest):
        kept: dict[str, Any] = {name: value for name, value in batch.items() if name in forward_names(model)}
        if tags is not None:
            kept["labels"] = torch.tensor([tags[row] for row in rows])
        elif labels and _predicts_tokens(model):
            kept["labels"] = _own_labels(batch)
        batches.append(kept)
    return batches


def _refuse_if(lacks_labels: bool, columns: Mapping[str, Sequence[Any]]) -> None:
    """Refuse data that the model can read, and that has no labels for a criterion that needs them."""
    if not lacks_labels:
        return
    found = f"the columns {', '.join(columns)}" if set(columns) - {"data"} else "no labels beside them"
    raise CalibrationError(
        f"the criterion learns from labels, and the calibration data has {found}: pass a datasets.Dataset with a "
        f"column {' or '.join(_LABELS)}, or batches with labels"
    )


def text_columns(columns: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
    """The columns that hold texts: one, or two for pairs.

    Raises:
        CalibrationError: If there is none, or several and none has a usual name.
    """
    texts = [name for name, values in columns.items() if any(isinstance(value, str) for value in values)]
    known = usual_texts(texts) or tuple(texts[:1] if len(texts) == 1 else ())
    if known:
        return known
    found = ", ".join(columns)
    if not texts:
        kinds = ", ".join(sorted({type(values[0]).__name__ for values in columns.values()}))
        raise CalibrationError(
            f"the calibration data has the columns {found}, and no texts, images, sounds or tokens in them (found: "
            f"{kinds}): expected texts, or the inputs of the model as tensors"
        )
    raise CalibrationError(
        f"the calibration data has several columns of texts ({', '.join(texts)}): choose with "
        f"data.select_columns([{texts[0]!r}]), or pass a list of texts, data[{texts[0]!r}]"
    )


def _check_texts(values: Sequence[Any]) -> None:
    for row, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise DataError(
                f"row {row} of the calibration data is {value!r:.40}, expected a text: fill it in or drop the row"
            )


def is_tokens(columns: Mapping[str, Sequence[Any]]) -> bool:
    """Whether columns hold the tokens of texts, not padded."""
    ids = columns.get("input_ids")
    return ids is not None and isinstance(ids[0], list | tuple) and all(isinstance(i, int) for i in ids[0])


def is_image(value: object) -> bool:
    """Whether a value is an image of PIL."""
    return type(value).__module__.startswith("PIL.") and hasattr(value, "convert")


def is_sound(value: object) -> bool:
    """Whether a value is a sound as ``datasets`` gives it: samples with their rate."""
    return (isinstance(value, Mapping) and {"array", "sampling_rate"} <= value.keys()) or hasattr(
        value, "get_all_samples"
    )


def _of_tokens(
    model: nn.Module, columns: Mapping[str, Sequence[Any]], processor: Any, tags: Sequence[Any] | None, *, own: bool
) -> list[Mapping[str, Any]]:
    """Batches of tokens; ``own`` says whether these are the labels where there are none."""
    names = [n for n, v in columns.items() if n in forward_names(model) and n not in _LABELS and _is_row(v[0])]
    examples = [{name: list(columns[name][row]) for name in names} for row in range(len(columns["input_ids"]))]
    order = sorted(range(len(examples)), key=lambda row: len(examples[row]["input_ids"]))
    tokenizer = None
    if len({len(example["input_ids"]) for example in examples}) > 1:
        tokenizer = _with_padding(find_tokenizer(model, processor))
    batches: list[Mapping[str, Any]] = []
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        part = [examples[row] for row in rows]
        batch: dict[str, Any]
        if tokenizer is None:
            batch = {name: torch.tensor([example[name] for example in part]) for name in names}
        else:
            batch = dict(tokenizer.pad(part, return_tensors="pt", return_attention_mask=True))
        if tags is not None:
            batch["labels"] = _padded_labels([tags[row] for row in rows], getattr(tokenizer, "padding_side", "right"))
        elif own:
            batch["labels"] = _own_labels(batch)
        batches.append({name: value for name, value in batch.items() if name in (*forward_names(model), "labels")})
    return batches


def _of_media(
    model: nn.Module, values: Sequence[Any], what: str, processor: Any, tags: Sequence[int] | None
) -> list[Mapping[str, Any]]:
    reader = find_processor(model, what, processor)
    batches: list[Mapping[str, Any]] = []
    for start in range(0, len(values), BATCH_SIZE):
        part = values[start : start + BATCH_SIZE]
        if what == "images":
            encoded = reader([image.convert("RGB") for image in part], return_tensors="pt")
        else:
            encoded = _encode_sounds(reader, part)
        batch = {n: x for n, x in encoded.items() if isinstance(x, Tensor) and n in forward_names(model)}
        if not batch:
            raise CalibrationError(
                f"{type(reader).__name__} makes {', '.join(encoded)} of {what}, and {type(model).__name__} takes none "
                f"of these: pass the processor of this model as tokenizer="
            )
        if tags is not None:
            batch["labels"] = torch.tensor(list(tags[start : start + BATCH_SIZE]))
        batches.append(batch)
    return batches


def _encode_sounds(reader: Any, sounds: Sequence[Any]) -> Mapping[str, Any]:
    arrays = []
    rate = getattr(reader, "sampling_rate", None)
    for number, sound in enumerate(sounds):
        samples = sound.get_all_samples() if hasattr(sound, "get_all_samples") else None  # of torchcodec
        found = sound["sampling_rate"] if samples is None else samples.sample_rate
        if rate is not None and found != rate:
            raise DataError(
                f"sound {number} has {found:,} samples a second, and the model reads {rate:,}: convert it, with "
                f"datasets by data.cast_column(name, Audio(sampling_rate={rate}))"
            )
        arrays.append(sound["array"] if samples is None else samples.data.mean(0).numpy())  # channels become one
    encoded: Mapping[str, Any] = reader(arrays, sampling_rate=rate, padding=True, return_tensors="pt")
    return encoded


def _label_column(model: Any, columns: Mapping[str, Sequence[Any]]) -> Sequence[Any] | None:
    """A class number for each row, or a list of labels for each row of tokens; None if there is nothing of use."""
    name = usual_column(columns, _LABELS)
    if name is None:
        return None
    if isinstance(columns[name][0], list | tuple):
        return _label_lists(model, columns, name) if is_tokens(columns) else None
    if _predicts_tokens(model):  # classes of texts, of which it knows nothing
        return None
    return label_numbers(columns[name], getattr(model.config, "label2id", None) or {}, model.config.num_labels)


def _label_lists(model: Any, columns: Mapping[str, Sequence[Any]], name: str) -> Sequence[Any]:
    one_each = _predicts_tokens(model) or type(model).__name__.endswith(("ForTokenClassification", "ForMaskedLM"))
    for row, (labels, ids) in enumerate(zip(columns[name], columns["input_ids"], strict=True), start=1):
        if not isinstance(labels, list | tuple) or not all(isinstance(label, int | float) for label in labels):
            raise DataError(f"row {row}: {name} is {labels!r:.80}, expected a list of numbers as in row 1")
        if one_each and len(labels) != len(ids):
            raise DataError(f"row {row}: {len(labels)} {name} for {len(ids)} tokens, expected one for each")
    return columns[name]


def _padded_labels(labels: Sequence[Any], side: str) -> Tensor:
    """(rows,) or, of lists, (rows, most): filled up with -100, which no loss counts, on the side of the tokens."""
    if not isinstance(labels[0], list | tuple):
        return torch.tensor(labels)
    most = max(map(len, labels))
    fill = [[-100] * (most - len(row)) for row in labels]
    return torch.tensor(
        [[*more, *row] if side == "left" else [*row, *more] for row, more in zip(labels, fill, strict=True)]
    )


def _own_labels(batch: Mapping[str, Any]) -> Tensor:
    """(rows, tokens): what a language model is to predict, its input without the padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels: Tensor = ids.clone() if mask is None else ids.masked_fill(mask == 0, -100)
    return labels


def _is_row(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, int) for item in value)


def _predicts_tokens(model: Any) -> bool:
    return is_language_model(type(model).__name__)


def _with_padding(tokenizer: Any) -> Any:
    """A tokenizer with a padding token: where it has none, any will do, since padding is masked."""
    if tokenizer.pad_token is not None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer
