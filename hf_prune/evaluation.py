"""How accurate a model is, and whether a pruned one is worse than its dense parent.

Two models are compared on the same examples, so the comparison is paired: what counts are the
examples that only one of them gets right, and the error of the difference is usually much smaller
than the errors of the two accuracies suggest.
"""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_prune.errors import ConfigError, DataError
from hf_prune.sources import check_columns, column, fingerprint, load_sst2

if TYPE_CHECKING:
    import evaluate
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LONGEST = 512  # tokens, where neither the tokenizer nor the model sets a lower limit
_PADDED_LEFT = frozenset({"xlnet"})  # these classify the last position, whatever is there


# --- accuracy --------------------------------------------------------------------------------------


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
    return _accuracy_class()()


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
            accuracy, standard_error = _accuracy(predictions, references)
            return {"accuracy": accuracy, "n": len(references), "standard_error": standard_error}

    return Accuracy


def _accuracy(predictions: Sequence[int], labels: Sequence[int]) -> tuple[float, float]:
    """Accuracy and its standard error."""
    n = len(labels)
    if n == 0:
        raise DataError("the accuracy of no examples is not defined: pass at least one prediction and its reference")
    p = sum(a == b for a, b in zip(predictions, labels, strict=True)) / n
    return p, math.sqrt(p * (1 - p) / n)


# --- evaluation ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What one model got right on one data set.

    Attributes:
        accuracy: Share of right predictions, 0 to 1.
        n: Number of examples.
        standard_error: Of the accuracy, ``sqrt(p (1 - p) / n)``, 0 to 0.5.
        predictions: Predicted class of each example, in the order of the data.
        labels: True class of each example, in the order of the data.
        split: Name of the split.
        source: Where the data came from.
        data_fingerprint: Hash of texts and labels, see ``sources.fingerprint``.
        seconds: Wall time of tokenising and predicting.
        dtype: Of the weights, such as ``float32``.
        max_length: Longer inputs were cut to this many tokens.
        batch_size: Examples per forward pass.
    """

    accuracy: float
    n: int
    standard_error: float
    predictions: tuple[int, ...]
    labels: tuple[int, ...]
    split: str
    source: str
    data_fingerprint: str
    seconds: float
    dtype: str
    max_length: int
    batch_size: int

    def __str__(self) -> str:
        """One line: accuracy and standard error in percent, n, and the data."""
        data = " ".join(part for part in (self.source, self.split) if part) or f"data {self.data_fingerprint}"
        return f"accuracy {100 * self.accuracy:.2f} % ± {100 * self.standard_error:.2f} (n = {self.n}, {data})"

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "predictions": list(self.predictions), "labels": list(self.labels)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """The inverse of ``to_dict``.

        Raises:
            DataError: If a field is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if names != set(values):
            raise DataError(
                f"not a saved evaluation: missing {sorted(names - set(values))}, "
                f"unknown {sorted(set(values) - names)}: pass what Evaluation.to_dict returned"
            )
        return cls(**{**values, "predictions": tuple(values["predictions"]), "labels": tuple(values["labels"])})


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
        _check_positive("limit", limit)
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
    progress: bool = False,
) -> Evaluation:
    """Measure the accuracy of a sequence classifier, on the device and in the dtype it has.

    Sentences of similar length share a batch, so little is computed on padding; the predictions come
    back in the order of the data. The model runs in eval mode and gets its training flags back.

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
        progress: Show a progress bar.

    Returns:
        Accuracy, predictions and how they were made.

    Raises:
        ConfigError: If ``batch_size``, ``max_length`` or ``text_columns`` is out of range.
        DataError: If the data set is empty or lacks a column, a label is not one of the model's, the
            tokenizer cannot pad as the model expects, or the model is no classifier or returns NaN.

    Example:
        >>> from datasets import Dataset
        >>> data = Dataset.from_dict({"sentence": ["a charming film", "dull"], "label": [1, 0]})
        >>> evaluate_classification(model, tokenizer, data).n  # doctest: +SKIP
        2
    """
    _check_positive("batch_size", batch_size)
    num_labels = _num_labels(model)
    _check_padding(tokenizer, model)
    max_length = _max_length(tokenizer, model, max_length)
    start = time.perf_counter()
    examples = _tokenize(tokenizer, dataset, text_columns, max_length)
    labels = _label_ids(dataset, label_column, _label2id(model), num_labels)
    predictions = _predict(model, tokenizer, examples, batch_size, progress)
    seconds = time.perf_counter() - start
    accuracy, standard_error = _accuracy(predictions, labels)
    return Evaluation(
        accuracy=accuracy,
        n=len(labels),
        standard_error=standard_error,
        predictions=tuple(predictions),
        labels=tuple(labels),
        split=split,
        source=source,
        data_fingerprint=fingerprint(dataset, [*text_columns, label_column]),
        seconds=seconds,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        max_length=max_length,
        batch_size=batch_size,
    )


def classification_batches(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    text_columns: Sequence[str] = ("sentence",),
    label_column: str = "label",
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
        label_column: The column of the labels.
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
        _check_positive(name, value)
    _check_padding(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    chosen = dataset.select(torch.randperm(len(dataset), generator=generator)[:n].tolist())
    examples = _tokenize(tokenizer, chosen, text_columns, max_length)
    labels = torch.tensor(_label_ids(chosen, label_column, label2id or {}, None))
    batches = []
    for start in range(0, len(examples), batch_size):
        rows = slice(start, start + batch_size)
        batches.append({**_pad(tokenizer, examples[rows], tokenizer.padding_side), "labels": labels[rows]})
    return batches


# --- steps of an evaluation ------------------------------------------------------------------------


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}: expected an integer of at least 1")


def _num_labels(model: PreTrainedModel) -> int:
    """The number of classes, if the model says that exactly one of several is right."""
    kind, num_labels = getattr(model.config, "problem_type", None), model.config.num_labels
    if num_labels is None or num_labels < 2 or kind in ("regression", "multi_label_classification"):
        raise DataError(
            f"{type(model).__name__} has num_labels = {num_labels} and problem_type = {kind!r}: accuracy needs a "
            "classifier with at least two classes of which one is right"
        )
    return num_labels


def _label2id(model: PreTrainedModel) -> dict[str, int]:
    return {str(name): int(number) for name, number in (model.config.label2id or {}).items()}


def _check_padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> None:
    if tokenizer.pad_token is None:
        raise DataError(
            f"{type(tokenizer).__name__} has no padding token, so sentences cannot share a batch: set "
            "tokenizer.pad_token = tokenizer.eos_token and model.config.pad_token_id = tokenizer.pad_token_id"
        )
    # Models find the last token, or number the positions, by this id: another one changes predictions silently.
    expected = tokenizer.pad_token_id if model is None else getattr(model.config, "pad_token_id", None)
    if expected != tokenizer.pad_token_id:
        raise DataError(
            f"the model pads with token {expected}, the tokenizer with {tokenizer.pad_token_id} "
            f"({tokenizer.pad_token!r}): set model.config.pad_token_id = tokenizer.pad_token_id, or load the "
            "tokenizer of this model"
        )


def _max_length(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, asked: int | None) -> int:
    """The length asked for if the model can take it, else the longest sensible one."""
    positions = _positions(model)
    if asked is None:
        return min(limit for limit in (tokenizer.model_max_length, positions, _LONGEST) if limit is not None)
    _check_positive("max_length", asked)
    if positions is not None and asked > positions:
        raise ConfigError(f"max_length is {asked}: {type(model).__name__} has only {positions} positions")
    return asked


def _positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model has positions for; None if it does not say."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return positions - module.padding_idx - 1  # RoBERTa and its kin start counting after the padding
    return positions


def _tokenize(
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
    """Class numbers, checked against the classes of the model if their number is known."""
    check_columns(dataset, [label_column], "the data set")
    ids = []
    for number, label in enumerate(column(dataset, label_column), start=1):
        if isinstance(label, str):
            if label not in label2id:
                known = ", ".join(map(repr, label2id)) or "none"
                raise DataError(
                    f"row {number}: label {label!r} is not in label2id (known: {known}): use those names, or class "
                    "numbers, in the data"
                )
            label = label2id[label]
        if not isinstance(label, int) or label < 0 or (num_labels is not None and label >= num_labels):
            limit = "0 or more" if num_labels is None else f"0 to {num_labels - 1}"
            raise DataError(f"row {number}: label {label!r} is no class, expected {limit}: drop or renumber such rows")
        ids.append(int(label))
    return ids


def _predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, list[int]]],
    batch_size: int,
    progress: bool,
) -> list[int]:
    """Predicted class of each example, in the order of ``examples``."""
    from tqdm.auto import tqdm

    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    side = "left" if model.config.model_type in _PADDED_LEFT else "right"
    device = next(model.parameters()).device
    unwanted = _unwanted_inputs(model)
    parts: list[Tensor] = []
    with _eval_mode(model), torch.inference_mode():
        for start in tqdm(range(0, len(order), batch_size), desc="evaluating", unit="batch", disable=not progress):
            batch = _pad(tokenizer, [examples[i] for i in order[start : start + batch_size]], side)
            inputs = {name: tensor.to(device) for name, tensor in batch.items() if name not in unwanted}
            logits = _check_logits(getattr(model(**inputs), "logits", None), model)
            # (batch, num_labels) -> (batch,); -1 marks NaN, found without waiting for the device at every batch
            parts.append(logits.argmax(dim=-1).masked_fill(logits.isnan().any(dim=-1), -1))
    predicted = torch.cat(parts).tolist()
    if -1 in predicted:
        raise DataError(
            f"{type(model).__name__} returns NaN for {predicted.count(-1)} of {len(predicted)} examples: its weights "
            f"are damaged, or {logits.dtype} overflows (load it in float32 or bfloat16)"
        )
    predictions = [0] * len(order)
    for i, prediction in zip(order, predicted, strict=True):
        predictions[i] = prediction
    return predictions


def _pad(tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, list[int]]], side: str) -> dict[str, Tensor]:
    """Pad to the longest example: (batch, seq) each."""
    from transformers.data.data_collator import pad_without_fast_tokenizer_warning

    padded = pad_without_fast_tokenizer_warning(tokenizer, examples, padding_side=side, return_tensors="pt")
    return dict(padded)


def _unwanted_inputs(model: PreTrainedModel) -> set[str]:
    """Inputs that a generic tokenizer makes and this model does not take (DistilBERT has no token types)."""
    base = getattr(model, "get_base_model", lambda: model)()  # what PEFT wraps
    parameters = inspect.signature(base.forward).parameters
    return {"token_type_ids"} if "input_ids" in parameters and "token_type_ids" not in parameters else set()


def _check_logits(logits: Any, model: PreTrainedModel) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] != model.config.num_labels:
        found = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no logits"
        raise DataError(
            f"{type(model).__name__} returns {found}, expected (batch, {model.config.num_labels}): load it with "
            "AutoModelForSequenceClassification"
        )
    return logits


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's own flag back afterwards."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


# --- comparison ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A pruned model against its dense parent on the same examples.

    Attributes:
        dense_accuracy: 0 to 1.
        pruned_accuracy: 0 to 1.
        drop: Percentage points lost, ``100 (dense - pruned)``; positive if the pruned model is worse.
        drop_standard_error: Of the drop, paired, in points.
        interval: Two-sided confidence interval of the drop, in points.
        upper_bound: One-sided upper confidence bound of the drop, in points: the pruned model is not
            worse by more than this.
        only_dense_right: Examples that only the dense model gets right.
        only_pruned_right: Examples that only the pruned model gets right.
        p_value: Of McNemar's exact two-sided test that both are equally accurate.
        n: Number of examples.
        confidence: Of the interval and of the bound, 0 to 1.
    """

    dense_accuracy: float
    pruned_accuracy: float
    drop: float
    drop_standard_error: float
    interval: tuple[float, float]
    upper_bound: float
    only_dense_right: int
    only_pruned_right: int
    p_value: float
    n: int
    confidence: float

    def __str__(self) -> str:
        """One line: both accuracies, the drop with interval and bound, the test, and n."""
        low, high = self.interval
        level = f"{100 * self.confidence:g} %"
        return (
            f"accuracy {100 * self.dense_accuracy:.2f} % -> {100 * self.pruned_accuracy:.2f} %: drop {self.drop:.2f} "
            f"points ({level} interval {low:.2f} to {high:.2f}, one-sided upper bound {self.upper_bound:.2f}; "
            f"{self.only_dense_right} only dense right, {self.only_pruned_right} only pruned right, "
            f"McNemar p = {self.p_value:.3g}, n = {self.n})"
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "interval": list(self.interval)}


def compare(dense: Evaluation, pruned: Evaluation, *, confidence: float = 0.95) -> Comparison:
    """Compare two models on the same examples: the drop in accuracy, and how sure it is.

    The interval and the bound are Wald's after adding 0.5 to each cell of the 2 x 2 table of right and
    wrong (Agresti & Min, "Simple improved confidence intervals for comparing matched proportions",
    Statistics in Medicine 24, 2005), which keeps their coverage close to nominal in small samples. The
    p-value is the exact binomial form of the test of McNemar ("Note on the sampling error of the
    difference between correlated proportions or percentages", Psychometrika 12, 1947).

    Args:
        dense: Result of the dense model.
        pruned: Result of the pruned model on the same data.
        confidence: Of the two-sided interval and of the one-sided bound, between 0 and 1.

    Returns:
        The drop in percentage points, its interval and bound, and the test.

    Raises:
        ConfigError: If ``confidence`` is not between 0 and 1.
        DataError: If the two are not on the same examples.

    Example:
        >>> print(compare(dense, pruned))  # doctest: +SKIP
        accuracy 90.48 % -> 89.91 %: drop 0.57 points (95 % interval -0.52 to 1.66, ...
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence!r}: expected a number between 0 and 1, such as 0.95")
    _check_paired(dense, pruned)
    n = dense.n
    pairs = [(a == y, b == y) for a, b, y in zip(dense.predictions, pruned.predictions, dense.labels, strict=True)]
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    _, standard_error = _paired_drop(lost, won, n)
    adjusted, adjusted_error = _paired_drop(lost + 0.5, won + 0.5, n + 2)
    two_sided = NormalDist().inv_cdf((1 + confidence) / 2) * adjusted_error
    one_sided = NormalDist().inv_cdf(confidence) * adjusted_error
    return Comparison(
        dense_accuracy=dense.accuracy,
        pruned_accuracy=pruned.accuracy,
        drop=100 * (lost - won) / n,
        drop_standard_error=100 * standard_error,
        interval=(100 * max(-1.0, adjusted - two_sided), 100 * min(1.0, adjusted + two_sided)),
        upper_bound=100 * min(1.0, adjusted + one_sided),
        only_dense_right=lost,
        only_pruned_right=won,
        p_value=_mcnemar(lost, won),
        n=n,
        confidence=confidence,
    )


def _check_paired(dense: Evaluation, pruned: Evaluation) -> None:
    if dense.n != pruned.n:
        raise DataError(f"the dense result has {dense.n} examples, the pruned one {pruned.n}: use the same data")
    if dense.data_fingerprint != pruned.data_fingerprint:
        raise DataError(
            f"the results are on different data (fingerprints {dense.data_fingerprint} and "
            f"{pruned.data_fingerprint}): evaluate both models on the same examples in the same order"
        )
    if dense.labels != pruned.labels:
        raise DataError("the results have different labels: give both models the same label2id and evaluate again")


def _paired_drop(lost: float, won: float, n: float) -> tuple[float, float]:
    """Difference of two paired proportions and its standard error, from the discordant counts."""
    return (lost - won) / n, math.sqrt((lost + won) - (lost - won) ** 2 / n) / n


def _mcnemar(lost: int, won: int) -> float:
    """P-value of the exact two-sided test: ``min(lost, won)`` heads or fewer in fair tosses, doubled."""
    tosses = lost + won
    term = tail = 1  # binomial coefficients, as exact integers
    for heads in range(min(lost, won)):
        term = term * (tosses - heads) // (heads + 1)
        tail += term
    return min(1.0, 2 * tail / 2**tosses)
