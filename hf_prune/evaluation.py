"""How accurate a sequence classifier is."""

from __future__ import annotations

import functools
import math
import re
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_prune.config import check_positive
from hf_prune.data_loading import check_columns, column, fingerprint, load_sst2
from hf_prune.errors import ConfigError, DataError
from hf_prune.masking import warn_regrown
from hf_prune.progress import Bar
from hf_prune.running import device_of, eval_mode, run_model
from hf_prune.tables import first_few

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
            return _accuracy(predictions, references)

    return Accuracy


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("split", "source", "data_fingerprint", "dtype", "classes"), (str,)),
    **dict.fromkeys(("max_length", "batch_size"), (int,)),
    "seconds": (float, int),
}
_KIND_NAMES = {str: "a text", int: "a whole number, 0 or more", float: "a number, 0 or more"}


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
        data_fingerprint: Hash of texts and labels, see ``data_loading.fingerprint``.
        seconds: Wall time of tokenising and predicting.
        dtype: Of the weights, such as ``float32``.
        max_length: Longer inputs were cut to this many tokens.
        batch_size: Examples per forward pass.
        classes: How the classes of the model and of the data differ, in words; empty if nothing says that they do.
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
    classes: str = ""

    def __str__(self) -> str:
        """One line: accuracy and standard error in percent, n, and the data."""
        data = " ".join(part for part in (self.source, self.split) if part) or f"data {self.data_fingerprint}"
        return f"accuracy {100 * self.accuracy:.2f} % ± {100 * self.standard_error:.2f} (n = {self.n}, {data})"

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "predictions": list(self.predictions), "labels": list(self.labels)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """The inverse of ``to_dict``; the accuracy is computed anew from the predictions.

        Raises:
            DataError: If a field is missing or unknown, or a number is not what the predictions give.
        """
        names = {field.name for field in fields(cls)}
        missing, unknown = names - {"classes", *values}, set(values) - names
        if missing or unknown:
            raise DataError(
                f"not a saved evaluation: missing {sorted(missing)}, unknown {sorted(unknown)}: pass what "
                f"Evaluation.to_dict returned"
            )
        for name, kinds in _KINDS.items():
            value = values.get(name, "")
            if type(value) not in kinds or (str not in kinds and not 0 <= value < 1e15):
                raise DataError(f"not a saved evaluation: {name} is {value!r}: expected {_KIND_NAMES[kinds[0]]}")
        for name in ("predictions", "labels"):
            if not isinstance(values[name], (list, tuple)):
                raise DataError(f"not a saved evaluation: {name} is {values[name]!r}: expected a list of class numbers")
        predictions, labels = tuple(values["predictions"]), tuple(values["labels"])
        if not all(type(number) is int and number >= 0 for number in (*predictions, *labels)):
            raise DataError("not a saved evaluation: predictions and labels are to be class numbers, 0 or more")
        if not 0 < len(labels) == len(predictions):
            raise DataError(f"not a saved evaluation: {len(predictions)} predictions of {len(labels)} labels")
        counted = _accuracy(predictions, labels)
        for name, number in counted.items():
            if not _is_near(values[name], number):
                raise DataError(
                    f"{name} is {values[name]!r}, but the predictions that are saved with it give {number!r}: the file "
                    f"was edited; measure again"
                )
        return cls(**{**values, **counted, "predictions": predictions, "labels": labels})


def _accuracy(predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float | int]:
    """Share of right predictions, their number, and the standard error."""
    n = len(labels)
    p = sum(a == b for a, b in zip(predictions, labels, strict=True)) / n
    return {"accuracy": p, "n": n, "standard_error": math.sqrt(p * (1 - p) / n)}


def _is_near(said: Any, counted: float) -> bool:
    return type(said) in (int, float) and math.isclose(said, counted, rel_tol=1e-9, abs_tol=1e-9)


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
    progress: bool | str = False,
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
        progress: Show a progress bar on a terminal; a string is its title.

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
    check_positive("batch_size", batch_size)
    warn_regrown(model, "what is scored is not the model that save_pretrained() writes, in which they are zero")
    _num_labels(model)
    _check_padding(tokenizer, model)
    max_length = _max_length(tokenizer, model, max_length)
    start = time.perf_counter()
    examples = _tokenize(tokenizer, dataset, text_columns, max_length)
    labels = class_numbers(dataset, label_column, model)
    predictions = _predict(model, tokenizer, examples, batch_size, progress)
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
    )


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
    _check_padding(tokenizer)
    rows = drawn(len(dataset), seed)[:n]
    chosen = dataset.select(rows)
    examples = _tokenize(tokenizer, chosen, text_columns, max_length)
    batches = [
        _pad(tokenizer, examples[start : start + batch_size], tokenizer.padding_side)
        for start in range(0, len(examples), batch_size)
    ]
    if label_column is not None:
        every = _label_ids(dataset, label_column, label2id or {}, None)  # so that errors name rows of the data
        labels = torch.tensor([every[row] for row in rows])
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
    examples = _tokenize(tokenizer, dataset, text_columns, max_length)
    labels = _label_ids(dataset, label_column, label2id or {}, None)
    return [{**example, "labels": label} for example, label in zip(examples, labels, strict=True)]


def drawn(n: int, seed: int = 0) -> list[int]:
    """The rows of a data set in the random order in which they are drawn for calibration."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def class_numbers(dataset: Dataset, label_column: str, model: PreTrainedModel) -> list[int]:
    """The labels of a data set as class numbers of a model.

    Args:
        dataset: With class numbers, or keys of ``model.config.label2id``.
        label_column: The column of the labels.
        model: A sequence classifier.

    Raises:
        DataError: If the column is missing, or a label is not one of the model's.
    """
    return _label_ids(dataset, label_column, _label2id(model), _num_labels(model))


# --- steps of an evaluation ------------------------------------------------------------------------


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


_UNNAMED = re.compile(r"(?:label ?)?(\d*)")  # what classes are called that nobody has named


def class_doubt(dataset: Dataset, label_column: str, labels: Sequence[int], config: Any) -> str:
    """How the classes of data and model differ, as far as their number and their names tell; empty if they do not.

    Args:
        dataset: The data.
        label_column: The column of the labels.
        labels: Its class numbers.
        config: Of the model.
    """
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    pairs = set(zip(column(dataset, label_column), labels, strict=True))
    said = sorted((name, number) for name, number in pairs if isinstance(name, str))
    for name, number in said:
        if _folded(names.get(number, name)) != _folded(name):
            return f"class {number} is {name!r} in the model's label2id, and {names[number]!r} in its id2label"
    if said:
        return ""
    there = getattr(dataset.features[label_column], "names", None)
    count = len(set(labels)) if there is None else len(there)
    if count != config.num_labels:
        which = f", of which {first_few(sorted(set(labels)), 5)} occur" if there is None else ""
        return f"the model has {config.num_labels} classes, and the data {count}{which}"
    theirs, ours = [_folded(name) for name in there or ()], [_folded(names.get(i, "")) for i in range(count)]
    plain = [_numbered(side) for side in (theirs, ours)]  # True: the names are but the numbers of the classes
    if there is None or plain in ([True, True], [True, None], [None, True]):
        return ""
    for number, name in enumerate(theirs):
        alike = [own for own in ours if own.startswith(name) or name.startswith(own)]  # "neg" is "negative"
        if name != ours[number] and (name in ours or alike != [ours[number]]):
            return f"class {number} is {names.get(number)!r} to the model, and {there[number]!r} in the data"
    return ""


def _folded(name: str) -> str:
    """A name as it is compared: in any case and width, with one kind of space between words."""
    text = unicodedata.normalize("NFKC", name).casefold().strip()
    return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", text)


def _numbered(names: Sequence[str]) -> bool | None:
    """Whether numbers that stand for names are those of the classes, from 0 or from 1; None if they are real names."""
    found = [match[1] for name in names if (match := _UNNAMED.fullmatch(name))]
    if len(found) < len(names):
        return None
    return any(all(text in ("", str(i + first)) for i, text in enumerate(found)) for first in (0, 1))


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
    positions = context_length(model)
    if asked is None:
        return min(limit for limit in (tokenizer.model_max_length, positions, _LONGEST) if limit is not None)
    check_positive("max_length", asked)
    if positions is not None and asked > positions:
        raise ConfigError(f"max_length is {asked}: {type(model).__name__} has only {positions} positions")
    return asked


def context_length(model: PreTrainedModel) -> int | None:
    """How many tokens the model has positions for; None if it does not say."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
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
    """Class numbers, checked against the classes of the model if their number is known; names in any case."""
    check_columns(dataset, [label_column], "the data set")
    folded: dict[str, set[int]] = {}
    for name, number in label2id.items():
        folded.setdefault(name.strip().casefold(), set()).add(number)
    ids = []
    for row, label in enumerate(column(dataset, label_column), start=1):
        if isinstance(label, str):
            alike = folded.get(label.strip().casefold(), set())
            if label not in label2id and len(alike) != 1:
                known = ", ".join(map(repr, label2id)) or "none"
                raise DataError(
                    f"row {row}: label {label!r} is not in label2id (known: {known}): use those names, or class "
                    "numbers, in the data"
                )
            label = label2id.get(label, next(iter(alike)))
        if not isinstance(label, int) or label < 0 or (num_labels is not None and label >= num_labels):
            limit = "0 or more" if num_labels is None else f"0 to {num_labels - 1}"
            hint = "; numbers to predict (regression) have no accuracy" if isinstance(label, float) else ""
            raise DataError(
                f"row {row}: label {label!r} is no class, expected {limit}: drop or renumber such rows{hint}"
            )
        ids.append(int(label))
    return ids


def _predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, list[int]]],
    batch_size: int,
    progress: bool | str,
) -> list[int]:
    """Predicted class of each example, in the order of ``examples``."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    side = "left" if model.config.model_type in _PADDED_LEFT else "right"
    device = device_of(model)
    parts: list[Tensor] = []
    starts, title = range(0, len(order), batch_size), progress if isinstance(progress, str) else "Scoring"
    with eval_mode(model), torch.inference_mode():
        for start in Bar(starts, desc=title, progress=bool(progress)):
            batch = _pad(tokenizer, [examples[i] for i in order[start : start + batch_size]], side)
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            logits = _check_logits(getattr(run_model(model, inputs, DataError), "logits", None), model)
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


def _check_logits(logits: Any, model: PreTrainedModel) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] != model.config.num_labels:
        found = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no logits"
        raise DataError(
            f"{type(model).__name__} returns {found}, expected (batch, {model.config.num_labels}): load it with "
            "AutoModelForSequenceClassification"
        )
    return logits
