"""Data for every model that is scored example by example. Describing the task loads none of the large libraries."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.data.checks import column, rows_named
from hf_prune.evaluation.data.loading import column_names, read_split
from hf_prune.evaluation.tasks.classification import ClassificationTask
from hf_prune.evaluation.tasks.language_modeling import LanguageModelingTask
from hf_prune.evaluation.tasks.scored_rows import ScoredRows
from hf_prune.planning.config import PruningConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_prune.evaluation.examples.base import Columns, ExampleKind
    from hf_prune.evaluation.examples.score import ExampleScore
    from hf_prune.evaluation.sentence_result import SentenceComparison

LANGUAGE = "language-modeling"
_BATCH = 16  # examples, of calibration


@dataclass(frozen=True)
class ExampleTask(ScoredRows):
    """Data of one kind of task; see :func:`hf_prune.evaluate_examples`.

    Args:
        kind: The kind of task, one of ``hf_prune.evaluation.examples.kinds.KINDS``.
        source: A file, a folder or a Hub data set.
        text_columns: What the model reads; None for columns with usual names.
        label_column: What it should say; the same.
        metric: The metric; None for the first of the kind.
        calibration_split: The split that calibrated criteria learn from.
        calibration_samples: How many examples they see.
        limit: Score only this many examples, the first ones; None for all.
    """

    kind: str
    source: str
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    metric: str | None = None
    calibration_split: str = "train"
    calibration_samples: int = 128
    limit: int | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """The kind, the metric and the columns, as keyword arguments of :func:`hf_prune.evaluate_examples`."""
        columns = {"text_columns": self.text_columns, "label_column": self.label_column}
        if self.kind == LANGUAGE:  # whose texts are loaded under one name
            columns["text_columns"] = None
        return {"kind": self.kind, "metric": self.metric, **columns}

    def load(self, split: str) -> Dataset:
        """One split."""
        if self.kind == LANGUAGE:
            from datasets import Dataset

            return Dataset.from_dict({"text": self._language().load(split)})
        content, where = read_split(os.fspath(self.source), split, texts=False)
        assert not isinstance(content, Path)
        if len(content) == 0:
            raise DataError(f"{where} has no rows: expected at least one")
        return content

    def load_scored(self, split: str) -> Dataset:
        """The rows of one split that are scored, which has the columns.

        Raises:
            DataError: If a column is missing.
        """
        data = super().load_scored(split)
        self._columns_of(data)
        return data

    @property
    def has_answers(self) -> bool:
        """Whether an example has one answer, a class or a set of labels, and not words or a number."""
        from hf_prune.evaluation.examples.kinds import find_kind

        return find_kind(self.kind).has_distributions

    def metric_label(self, data: Dataset) -> str:
        """What the metric is called in results."""
        from hf_prune.evaluation.examples.kinds import find_kind

        return find_kind(self.kind).metric(self.metric).label

    def held_out(self, n: int, seen: int | None = None, model: Any = None) -> Dataset:
        """Examples of the calibration split that calibration did not see, in a fixed random order.

        Texts, and lists of words, share no five words in a row with what it saw, as those of a ``ClassificationTask``.
        Images are other rows, and that is all: the same picture in two rows may be on both sides.

        Args:
            n: How many; all that remain if there are fewer.
            seen: How many examples calibration and a polish see; by default ``calibration_samples``.
            model: Not used.

        Raises:
            DataError: If a column is missing, or none remains.
        """
        from hf_prune.evaluation.examples.kinds import find_kind

        data = self.load(self.calibration_split)
        inputs = self._columns_of(data).inputs
        if find_kind(self.kind).reads_media:
            return self._unseen(data, None, n, seen)
        rows = zip(*(column(data, name) for name in inputs), strict=True)
        texts = [" ".join(" ".join(part) if isinstance(part, list) else str(part) for part in row) for row in rows]
        return self._unseen(data, texts, n, seen)

    def _columns_of(self, data: Dataset) -> Columns:
        from hf_prune.evaluation.examples.kinds import find_kind

        named = (self.columns["text_columns"], self.label_column)
        return find_kind(self.kind).columns(data.column_names, "the data set", *named)

    def _has_columns(self, kind: ExampleKind) -> bool:
        try:
            kind.columns(column_names(self.source) or [], "", self.text_columns, self.label_column)
        except DataError:
            return False
        return True

    def _texts(self) -> ClassificationTask:
        """The texts alone, on which every model that reads texts can be calibrated."""
        return ClassificationTask(
            self.source, self.text_columns, None, self.calibration_split, self.calibration_samples
        )

    def _language(self) -> LanguageModelingTask:
        name = self.text_columns[0] if self.text_columns else None
        return LanguageModelingTask(self.source, name, self.calibration_split, self.calibration_samples)

    def check_model_class(self, source: str, name: str, *, labelled: bool = True) -> None:
        """Nothing to check: the kind was chosen by the class."""

    def calibration_batches(
        self, configs: Sequence[PruningConfig], model: Any, tokenizer: Any, n: int | None = None
    ) -> list[dict[str, Any]] | None:
        """Batches, with labels if a criterion needs them; None if none of the configs needs data.

        Args:
            configs: The configs that will be used.
            model: The model.
            tokenizer: Its tokenizer or processor.
            n: How many examples; by default ``calibration_samples``. A larger draw begins with the smaller one.
        """
        if not any(config.needs_data for config in configs):
            return None
        if self.kind == LANGUAGE:
            return self._language().calibration_batches(configs, model, tokenizer, n)
        from hf_prune.criteria.base import LABELLED
        from hf_prune.evaluation.data.classification import sample_order
        from hf_prune.evaluation.examples.evaluate import encoded_examples
        from hf_prune.evaluation.examples.kinds import find_kind

        labels = any(config.needs & LABELLED for config in configs)
        kind = find_kind(self.kind)
        if not labels and not kind.reads_media and not self._has_columns(kind):
            return self._texts().calibration_batches(configs, model, tokenizer, n)
        data = self.load(self.calibration_split)
        columns = self._columns_of(data)
        kind.check(model, tokenizer)
        chosen = data.select(sample_order(len(data))[: n or self.calibration_samples])
        examples = encoded_examples(kind, model, tokenizer, chosen, columns)
        parts = (examples[start : start + _BATCH] for start in range(0, len(examples), _BATCH))
        return [kind.collate(model, tokenizer, part, labels) for part in parts]

    def streaming_batches(
        self, tokenizer: Any, positions: int | None, label2id: Mapping[str, int] | None = None
    ) -> list[dict[str, Any]]:
        """Calibration batches of texts for a model that is never loaded as a whole.

        Args:
            tokenizer: The model's tokenizer.
            positions: How many tokens the model has positions for.
            label2id: The model's labels, if the batches need some.

        Raises:
            ConfigError: If the model reads images, or labels are needed.
        """
        from hf_prune.evaluation.examples.kinds import find_kind

        if label2id is not None:
            raise ConfigError(
                f"--stream reads labels of sequence classifiers and language models alone, and this is data for "
                f"{self.kind}: leave it out, or choose a criterion without labels, such as fisher_diagonal"
            )
        if not find_kind(self.kind).reads_media:
            return self._texts().streaming_batches(tokenizer, positions)
        raise ConfigError(
            f"--stream reads texts alone, and this is data for {self.kind}: leave it out, or choose a criterion "
            f"without data, such as magnitude"
        )

    def training_examples(self, split: str, model: Any, tokenizer: Any) -> NoReturn:
        """Refuse: sequence classifiers and language models are trained here, others by a Trainer of their own.

        Raises:
            DataError: Always.
        """
        raise DataError(
            f"a model for {self.kind} is not trained by this command: train it in Python, with a PruningTrainer and "
            f"the data and collator of its task"
        )

    def data_collator(self, tokenizer: Any) -> None:
        """None: nothing is trained."""

    def score(
        self, model: Any, tokenizer: Any, split: str, *, source: str | None = None, **options: Any
    ) -> ExampleScore:
        """The score on a split.

        Args:
            model: The model.
            tokenizer: Its tokenizer or processor.
            split: Which split.
            source: What to call the data in the result.
            **options: Passed to :func:`hf_prune.evaluate_examples`.
        """
        from hf_prune.evaluation.examples.evaluate import evaluate_examples

        with rows_named(self.source, split):
            return evaluate_examples(model, tokenizer, self.load_scored(split), **self.named(split, source), **options)

    def compare(self, dense: ExampleScore, pruned: ExampleScore) -> SentenceComparison:
        """Two scores on the same examples, compared in pairs."""
        from hf_prune.evaluation.examples.score import compare_examples

        return compare_examples(dense, pruned)
