"""Measure the accuracy of a sequence classifier."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_prune.errors import DataError
from hf_prune.evaluation.accuracy_result import Evaluation, share_correct
from hf_prune.evaluation.data.classification import (
    check_padding,
    class_numbers,
    count_labels,
    longest_input,
    pad,
    tokenize,
)
from hf_prune.evaluation.data.loading import fingerprint, load_sst2
from hf_prune.evaluation.divergence import IMPOSSIBLE, pack_rows
from hf_prune.evaluation.labels import class_doubt
from hf_prune.planning.checks import check_positive
from hf_prune.pruning.mask_store import warn_regrown
from hf_prune.utils.forward import device_of, eval_mode, run_model
from hf_prune.utils.progress import Bar

if TYPE_CHECKING:
    import evaluate
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PADDED_LEFT = frozenset({"xlnet"})  # these classify the last position, padding or not


def accuracy_metric() -> evaluate.Metric:
    """The accuracy as a metric of the ``evaluate`` library that needs no network.

    Returns:
        An ``evaluate.Metric``. ``compute(predictions=..., references=...)`` takes class numbers and returns
        ``accuracy`` (0 to 1), ``n`` and ``standard_error`` (of the accuracy, binomial).

    Raises:
        DataError: From ``compute``, if there is nothing to compute from.

    Example:
        >>> accuracy_metric().compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
        {'accuracy': 0.75, 'n': 4, 'standard_error': 0.21650635094610965}
    """
    return _accuracy_class()(keep_in_memory=True)


@functools.cache
def _accuracy_class() -> type[evaluate.Metric]:
    import evaluate
    from datasets import Features, Value

    class Accuracy(evaluate.Metric):
        """Share of predictions that equal the reference."""

        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description="Share of predictions that equal the reference, with its binomial standard error.",
                citation="",
                inputs_description=(
                    "\nArgs:\n    predictions: Class numbers.\n    references: Class numbers, as many.\n"
                    "Returns:\n    accuracy (0 to 1), n, and standard_error = sqrt(accuracy (1 - accuracy) / n).\n"
                ),
                features=Features({"predictions": Value("int64"), "references": Value("int64")}),
            )

        def _compute(self, *, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float | int]:
            n = len(references)
            if n == 0:
                raise DataError(
                    "the accuracy of no examples is not defined: pass at least one prediction and its reference"
                )
            return share_correct(predictions, references)

    return Accuracy


def evaluate_sst2(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "validation",
    source: str = "glue/sst2",
    limit: int | None = None,
    **options: Any,
) -> Evaluation:
    """Measure the accuracy of a sentiment classifier on SST-2.

    Args:
        model: A sequence classifier with two classes, 0 negative and 1 positive.
        tokenizer: Its tokenizer.
        split: ``validation`` (872 sentences) or ``train``; the test split has no labels.
        source: ``"glue/sst2"`` for the Hub, or a local folder; see ``load_sst2``.
        limit: Use only the first so many sentences.
        **options: Passed on to ``evaluate_classification``: ``batch_size``, ``max_length``, ``progress``.

    Returns:
        Accuracy, predictions and how they were made.

    Raises:
        ConfigError: If ``limit`` is below 1.
        DataError: If the data cannot be read or does not fit the model.

    Example:
        >>> print(evaluate_sst2(model, tokenizer, source="data/sst2"))  # doctest: +SKIP
        accuracy 90.48 % ± 0.99 (n = 872, data/sst2 validation)
    """
    if limit is not None:
        check_positive("limit", limit)
    dataset = load_sst2(split, source)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return evaluate_classification(model, tokenizer, dataset, source=str(source), split=split, **options)


def evaluate_classification(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    text_columns: Sequence[str] = ("sentence",),
    label_column: str = "label",
    batch_size: int = 32,
    max_length: int | None = None,
    source: str = "",
    split: str = "",
    progress: bool | str | None = None,
) -> Evaluation:
    """Measure the accuracy of a sequence classifier, on the device and in the dtype it has.

    Sentences of similar length share a batch, so little is computed on padding; the predictions are
    returned in the order of the data. The model runs in eval mode, and its training flags are restored.

    Args:
        model: A sequence classifier: ``logits`` of shape (batch, num_labels).
        tokenizer: Its tokenizer, with a padding token.
        dataset: Texts and labels; labels are class numbers or keys of ``model.config.label2id``.
        text_columns: One text column, or two for pairs.
        label_column: The column of the labels.
        batch_size: Examples per forward pass.
        max_length: Longer inputs are cut to this many tokens. By default what tokenizer and model
            allow, at most 512.
        source: Where the data came from, for the record.
        split: Its split, for the record.
        progress: Show a progress bar on a terminal; a string is its title.

    Returns:
        Accuracy, predictions and how they were made.

    Raises:
        ConfigError: If ``batch_size``, ``max_length`` or ``text_columns`` is out of range.
        DataError: If the data set is empty or lacks a column, a label is not one of the model's, the
            tokenizer cannot pad as the model expects, or the model is not a classifier or returns NaN.

    Example:
        >>> from datasets import Dataset
        >>> data = Dataset.from_dict({"sentence": ["a charming film", "dull"], "label": [1, 0]})
        >>> evaluate_classification(model, tokenizer, data).n  # doctest: +SKIP
        2
    """
    check_positive("batch_size", batch_size)
    warn_regrown(model, "what is scored is not the model that save_pretrained() writes, in which they are zero")
    count_labels(model)
    check_padding(tokenizer, model)
    max_length = longest_input(tokenizer, model, max_length)
    start = time.perf_counter()
    examples = tokenize(tokenizer, dataset, text_columns, max_length)
    labels = class_numbers(dataset, label_column, model)
    distributions = _predict(model, tokenizer, examples, batch_size, progress)
    predictions = distributions.numpy().argmax(axis=-1).tolist()  # of equal ones the first
    seconds = time.perf_counter() - start
    score = accuracy_metric().compute(predictions=predictions, references=labels)
    return Evaluation(
        accuracy=score["accuracy"],
        n=score["n"],
        standard_error=score["standard_error"],
        predictions=tuple(predictions),
        labels=tuple(labels),
        split=split,
        source=source,
        data_fingerprint=fingerprint(dataset, [*text_columns, label_column]),
        seconds=seconds,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        max_length=max_length,
        batch_size=batch_size,
        classes=class_doubt(dataset, label_column, labels, model.config),
        distributions=pack_rows(distributions),
    )


def _predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, list[int]]],
    batch_size: int,
    progress: bool | str | None,
) -> Tensor:
    """(n, num_labels) float32 log-probabilities of each example's classes, in the order of ``examples``."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    side = "left" if model.config.model_type in _PADDED_LEFT else "right"
    device = device_of(model)
    parts: list[Tensor] = []
    starts, title = range(0, len(order), batch_size), progress if isinstance(progress, str) else "Scoring"
    with eval_mode(model), torch.inference_mode():
        for start in Bar(starts, desc=title, progress=progress):
            batch = pad(tokenizer, [examples[i] for i in order[start : start + batch_size]], side)
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            logits = _check_logits(getattr(run_model(model, inputs, DataError), "logits", None), model)
            parts.append(logits.double().log_softmax(dim=-1).clamp_min(IMPOSSIBLE).float())
    rows = torch.cat(parts).cpu()
    if broken := int(rows.isnan().any(dim=-1).sum()):
        raise DataError(
            f"{type(model).__name__} returns NaN for {broken} of {len(rows)} examples: its weights "
            f"are damaged, or {logits.dtype} overflows (load it in float32 or bfloat16)"
        )
    distributions = torch.empty_like(rows)
    distributions[order] = rows
    return distributions


def _check_logits(logits: Any, model: PreTrainedModel) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] != model.config.num_labels:
        returned = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no logits"
        raise DataError(
            f"{type(model).__name__} returns {returned}, expected (batch, {model.config.num_labels}): load it with "
            "AutoModelForSequenceClassification"
        )
    return logits
