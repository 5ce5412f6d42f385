"""Labelled texts for sequence classifiers. Describing the task loads none of the large libraries."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.data.checks import column, rows_named
from hf_prune.evaluation.data.columns import find_label_column, find_text_columns
from hf_prune.evaluation.data.loading import column_names, load_classification
from hf_prune.evaluation.tasks.scored_rows import ScoredRows
from hf_prune.planning.config import PruningConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_prune.evaluation.accuracy_result import Evaluation
    from hf_prune.evaluation.comparison import Comparison


@dataclass(frozen=True)
class ClassificationTask(ScoredRows):
    """Labelled texts for a sequence classifier, scored by accuracy.

    Args:
        source: A file, a folder or a Hub data set, as for :func:`hf_prune.load_classification`.
        text_columns: One text column, or two for pairs; None for those with usual names.
        label_column: The label column; None for the one with a usual name.
        calibration_split: The split that calibrated criteria learn from.
        calibration_samples: How many examples they see.
        limit: Score only this many examples, the first ones; None for all.
    """

    source: str = ""
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    calibration_split: str = "train"
    calibration_samples: int = 128
    limit: int | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """The columns, as keyword arguments of functions that take labelled data."""
        texts = self.texts
        label = self.label_column or find_label_column(self._available, repr(self.source))
        return {"text_columns": texts, "label_column": label}

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of the texts."""
        return self.text_columns or find_text_columns(self._available, repr(self.source))

    @functools.cached_property
    def _available(self) -> list[str]:
        return column_names(self.source) or ["text"]  # of lines of text

    def load(self, split: str) -> Dataset:
        """One split."""
        return load_classification(self.source, split, **self.columns)

    def load_unlabelled(self, split: str) -> Dataset:
        """The texts of one split, without their labels; each line of a text file is a text."""
        return load_classification(self.source, split, text_columns=self.texts, label_column=None)

    def check_model_class(self, source: str, name: str, *, labelled: bool = True) -> None:
        """Make sure that a model is of this task.

        Args:
            source: Where the model is, for the message.
            name: Its class; empty if that is not known yet.
            labelled: Whether labels are needed; without them, any model that reads texts will do.

        Raises:
            DataError: If it is not a sequence classifier.
        """
        if labelled and name and not name.endswith("ForSequenceClassification"):
            hint = ""
            if name.endswith("Model"):
                hint = (
                    "; a plain encoder is scored on pairs of texts as a model of sentence-transformers: "
                    f"SentenceTransformer({source!r}).save('encoder') makes it one"
                )
            raise DataError(
                f"{source!r} is a {name}: expected a …ForSequenceClassification, which has labels and is scored by "
                f"accuracy, or a …ForCausalLM, which is scored by perplexity; evaluate, sweep and prune also take "
                f"…ForTokenClassification, …ForQuestionAnswering, …ForImageClassification, models that write texts for "
                f"texts (…ForConditionalGeneration), and models of sentence-transformers{hint}"
            )

    def calibration_batches(
        self, configs: Sequence[PruningConfig], model: Any, tokenizer: Any, n: int | None = None
    ) -> list[dict[str, Any]] | None:
        """Padded batches, with labels if a criterion needs them; None if none of the configs needs data.

        Args:
            configs: The configs that will be used.
            model: The model.
            tokenizer: Its tokenizer.
            n: How many examples; by default ``calibration_samples``. A larger draw begins with the smaller one.
        """
        if not any(config.needs_data for config in configs):
            return None
        from hf_prune.criteria.base import LABELLED

        label_column = self.columns["label_column"] if any(config.needs & LABELLED for config in configs) else None
        return self._batches(tokenizer, n or self.calibration_samples, label_column, model.config.label2id)

    def _batches(
        self, tokenizer: Any, n: int, label_column: str | None, label2id: Mapping[str, int]
    ) -> list[dict[str, Any]]:
        from hf_prune.evaluation.data.classification import classification_batches

        with rows_named(self.source, self.calibration_split):
            return classification_batches(
                (self.load if label_column else self.load_unlabelled)(self.calibration_split),
                tokenizer,
                n=n,
                text_columns=self.texts,
                label_column=label_column,
                label2id=label2id,
            )

    def streaming_batches(
        self, tokenizer: Any, positions: int | None, label2id: Mapping[str, int] | None = None
    ) -> list[dict[str, Any]]:
        """Calibration batches for a model that is never loaded as a whole.

        Args:
            tokenizer: The model's tokenizer; gets a padding token if it has none.
            positions: How many tokens the model has positions for; not used here.
            label2id: The model's labels, if the batches need some: they are then those of a model in memory.

        Raises:
            ConfigError: If there are two text columns, and no labels.
        """
        if label2id is not None:
            return self._batches(tokenizer, self.calibration_samples, self.columns["label_column"], label2id)
        from hf_prune.calibration.texts import text_batches
        from hf_prune.evaluation.data.classification import sample_order

        if len(self.texts) != 1:
            raise ConfigError(f"found {len(self.texts)} text columns: expected one, since streaming reads texts")
        if tokenizer.pad_token is None:  # any token will do: padding is masked
            tokenizer.pad_token = tokenizer.eos_token
        texts = column(self.load_unlabelled(self.calibration_split), self.texts[0])
        return text_batches([texts[i] for i in sample_order(len(texts))[: self.calibration_samples]], tokenizer)

    @property
    def has_answers(self) -> bool:
        """True: a class for each example."""
        return True

    def metric_label(self, data: Dataset) -> str:
        """Accuracy, always."""
        return "accuracy"

    def held_out(self, n: int, seen: int | None = None, model: Any = None) -> Dataset:
        """Examples of the calibration split that share no five words in a row with those that calibration saw.

        Data sets contain some texts more than once, and parts of texts: those of SST-2 are cut from longer ones.

        Args:
            n: How many; all that remain if there are fewer.
            seen: How many examples calibration and a polish see; by default ``calibration_samples``.
            model: Not used.

        Raises:
            DataError: If none remains.
        """
        data = self.load(self.calibration_split)
        columns = [column(data, name) for name in self.texts]
        return self._unseen(data, [" ".join(map(str, parts)) for parts in zip(*columns, strict=True)], n, seen)

    def training_examples(self, split: str, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
        """All examples of a split as a ``Trainer`` takes them: tokenized, with labels."""
        from hf_prune.evaluation.data.classification import classification_examples, context_length

        with rows_named(self.source, split):
            return classification_examples(
                self.load(split),
                tokenizer,
                **self.columns,
                max_length=min(128, context_length(model) or 128),
                label2id=model.config.label2id,
            )

    def data_collator(self, tokenizer: Any) -> Any:
        """What makes batches of :meth:`training_examples`."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def score(self, model: Any, tokenizer: Any, split: str, *, source: str | None = None, **options: Any) -> Evaluation:
        """The accuracy on a split.

        Args:
            model: A sequence classifier.
            tokenizer: Its tokenizer.
            split: Which split.
            source: What to call the data in the result.
            **options: Passed to :func:`hf_prune.evaluate_classification`.
        """
        from hf_prune.evaluation.accuracy import evaluate_classification

        with rows_named(self.source, split):
            return evaluate_classification(
                model, tokenizer, self.load_scored(split), **self.named(split, source), **options
            )

    def compare(self, dense: Evaluation, pruned: Evaluation) -> Comparison:
        """Two scores on the same examples, compared in pairs."""
        from hf_prune.evaluation.comparison import compare

        return compare(dense, pruned)
