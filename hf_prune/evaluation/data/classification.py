"""Turn labelled texts into batches and examples for a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_prune.calibration.labels import label_numbers
from hf_prune.calibration.texts import context_length
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.data.checks import check_columns, column
from hf_prune.planning.checks import check_positive

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LONGEST = 512  # tokens, where neither the tokenizer nor the model sets a lower limit


def classification_batches(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    text_columns: Sequence[str] = ("sentence",),
    label_column: str | None = "label",
    max_length: int = 128,
    label2id: Mapping[str, int] | None = None,
) -> list[dict[str, Tensor]]:
    """Draw random labelled examples as padded batches, for calibration.

    Args:
        dataset: Texts and labels.
        tokenizer: A tokenizer with a padding token.
        n: How many examples, drawn without replacement; all if there are fewer.
        batch_size: Examples per batch; the last batch may be smaller.
        seed: The same seed draws the same examples in the same order.
        text_columns: One text column, or two for pairs.
        label_column: The column of the labels; None for batches without labels.
        max_length: Longer inputs are cut to this many tokens.
        label2id: Class numbers of string labels: ``model.config.label2id``.

    Returns:
        Batches on the CPU with what the model takes: ``input_ids`` and ``attention_mask`` (batch, seq),
        perhaps ``token_type_ids`` (batch, seq), and ``labels`` (batch,), all int64.

    Raises:
        ConfigError: If ``n``, ``batch_size``, ``max_length`` or ``text_columns`` is out of range.
        DataError: If the data set is empty or lacks a column, a label is negative or unknown, or the
            tokenizer has no padding token.

    Example:
        >>> batches = classification_batches(load_sst2("train"), tokenizer, n=64)  # doctest: +SKIP
        >>> loss = model(**batches[0]).loss  # doctest: +SKIP
    """
    for name, value in (("n", n), ("batch_size", batch_size), ("max_length", max_length)):
        check_positive(name, value)
    check_padding(tokenizer)
    rows = sample_order(len(dataset), seed)[:n]
    chosen = dataset.select(rows)
    examples = tokenize(tokenizer, chosen, text_columns, max_length)
    batches = [
        pad(tokenizer, examples[start : start + batch_size], tokenizer.padding_side)
        for start in range(0, len(examples), batch_size)
    ]
    if label_column is not None:
        all_labels = _label_ids(dataset, label_column, label2id or {}, None)  # so that errors name rows of the data
        labels = torch.tensor([all_labels[row] for row in rows])
        for batch, part in zip(batches, labels.split(batch_size), strict=True):
            batch["labels"] = part
    return batches


def classification_examples(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_columns: Sequence[str] = ("sentence",),
    label_column: str = "label",
    max_length: int = 128,
    label2id: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """All examples of a data set as a ``Trainer`` takes them, not padded.

    Args:
        dataset: Texts and labels.
        tokenizer: The model's tokenizer.
        text_columns: One text column, or two for pairs.
        label_column: The column of the labels.
        max_length: Longer inputs are cut to this many tokens.
        label2id: Class numbers of string labels: ``model.config.label2id``.

    Returns:
        For each example lists of token ids and the like, and its class number as ``labels``.

    Raises:
        ConfigError: If ``max_length`` or ``text_columns`` is out of range.
        DataError: If the data set is empty or lacks a column, or a label is negative or unknown.
    """
    check_positive("max_length", max_length)
    examples = tokenize(tokenizer, dataset, text_columns, max_length)
    labels = _label_ids(dataset, label_column, label2id or {}, None)
    return [{**example, "labels": label} for example, label in zip(examples, labels, strict=True)]


def sample_order(n: int, seed: int = 0) -> list[int]:
    """The rows of a data set in the random order in which calibration draws them."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def class_numbers(dataset: Dataset, label_column: str, model: PreTrainedModel) -> list[int]:
    """The labels of a data set as class numbers of a model.

    Args:
        dataset: The data; labels are class numbers, or keys of ``model.config.label2id``.
        label_column: The column of the labels.
        model: A sequence classifier.

    Raises:
        DataError: If the column is missing, or a label is not one of the model's.
    """
    return _label_ids(dataset, label_column, _label2id(model), count_labels(model))


def count_labels(model: PreTrainedModel) -> int:
    """The number of classes of a model.

    Raises:
        DataError: If it does not choose one of several classes.
    """
    kind, num_labels = getattr(model.config, "problem_type", None), model.config.num_labels
    if num_labels is None or num_labels < 2 or kind in ("regression", "multi_label_classification"):
        raise DataError(
            f"{type(model).__name__} has num_labels = {num_labels} and problem_type = {kind!r}: accuracy needs a "
            "classifier with at least two classes of which one is right"
        )
    return num_labels


def _label2id(model: PreTrainedModel) -> dict[str, int]:
    return {str(name): int(number) for name, number in (model.config.label2id or {}).items()}


def check_padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> None:
    """Make sure that sentences of different lengths can share a batch.

    Raises:
        DataError: If the tokenizer has no padding token, or the model expects another one.
    """
    if tokenizer.pad_token is None:
        raise DataError(
            f"{type(tokenizer).__name__} has no padding token, so sentences cannot share a batch: set "
            "tokenizer.pad_token = tokenizer.eos_token and model.config.pad_token_id = tokenizer.pad_token_id"
        )
    # Models find the last token, or number the positions, by this id: another one changes predictions silently.
    expected = tokenizer.pad_token_id if model is None else getattr(model.config, "pad_token_id", None)
    if expected is None and model is not None and model.is_custom_code():
        return  # whose config need not have one: it goes by the attention mask, or by nothing
    if expected != tokenizer.pad_token_id:
        raise DataError(
            f"the model pads with token {expected}, the tokenizer with {tokenizer.pad_token_id} "
            f"({tokenizer.pad_token!r}): set model.config.pad_token_id = tokenizer.pad_token_id, or load the "
            "tokenizer of this model"
        )


def longest_input(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, requested: int | None) -> int:
    """The maximum length of an input: the requested one, or by default what tokenizer and model allow, at most 512.

    Raises:
        ConfigError: If the model has fewer positions than requested.
    """
    positions = context_length(model)
    if requested is None:
        return min(limit for limit in (tokenizer.model_max_length, positions, _LONGEST) if limit is not None)
    check_positive("max_length", requested)
    if positions is not None and requested > positions:
        raise ConfigError(f"max_length is {requested}: {type(model).__name__} has only {positions} positions")
    return requested


def tokenize(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, text_columns: Sequence[str], max_length: int
) -> list[dict[str, list[int]]]:
    """One dict of unpadded model inputs per example."""
    if isinstance(text_columns, str) or len(text_columns) not in (1, 2):
        raise ConfigError(f"text_columns is {text_columns!r}: expected a list of one column, or of two for pairs")
    if len(dataset) == 0:
        raise DataError("the data set is empty: expected at least one example")
    check_columns(dataset, text_columns, "the data set")
    encoded = tokenizer(*(column(dataset, name) for name in text_columns), truncation=True, max_length=max_length)
    names = [name for name in encoded if name in tokenizer.model_input_names]
    return [{name: encoded[name][i] for name in names} for i in range(len(dataset))]


def _label_ids(dataset: Dataset, label_column: str, label2id: Mapping[str, int], num_labels: int | None) -> list[int]:
    check_columns(dataset, [label_column], "the data set")
    return label_numbers(column(dataset, label_column), label2id, num_labels)


def pad(tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, list[int]]], side: str) -> dict[str, Tensor]:
    """Pad to the longest example: (batch, seq) each."""
    from transformers.data.data_collator import pad_without_fast_tokenizer_warning

    padded = pad_without_fast_tokenizer_warning(tokenizer, examples, padding_side=side, return_tensors="pt")
    return dict(padded)
