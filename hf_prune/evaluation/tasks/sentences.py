"""Texts for models of sentence-transformers. Describing the task loads none of the large libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.data.checks import column
from hf_prune.evaluation.data.overlap import overlapping
from hf_prune.evaluation.data.sentences import SentenceColumns, load_sentences, load_unscored, sentence_columns
from hf_prune.evaluation.sentence_result import NDCG
from hf_prune.evaluation.tasks.scored_rows import ScoredRows
from hf_prune.planning.config import PruningConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_prune.evaluation.sentence_result import SentenceComparison, SentenceScore


@dataclass(frozen=True)
class SentenceTask(ScoredRows):
    """Pairs of texts with a score, or queries with documents, for a ``SentenceTransformer`` or a ``CrossEncoder``.

    Scored by Spearman's rank correlation, or by nDCG@10 and MRR@10; see :func:`hf_prune.evaluate_sentences`.

    Args:
        source: A file, a folder or a Hub data set, as for :func:`hf_prune.load_sentences`; to calibrate a
            ``SentenceTransformer``, text files too, in which every line is a text.
        text_columns: The columns of texts: two, or any for calibration alone; None for those that
            :func:`hf_prune.load_sentences` looks for.
        score_column: The column of the score, as there.
        metric: As there.
        calibration_split: The split that calibrated criteria learn from.
        calibration_samples: How many texts, or pairs of a ``CrossEncoder``, they see.
        limit: Score only this many rows, the first ones; None for all.
    """

    source: str
    text_columns: tuple[str, ...] | None = None
    score_column: str | None = None
    metric: str | None = None
    calibration_split: str = "train"
    calibration_samples: int = 128
    limit: int | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """The columns and the metric, as keyword arguments of functions that take such data."""
        return {"text_columns": self.text_columns, "score_column": self.score_column, "metric": self.metric}

    def load(self, split: str) -> Dataset:
        """One split."""
        return load_sentences(self.source, split, **self.columns)

    def check_model_class(self, source: str, name: str, *, labelled: bool = True) -> None:
        """Nothing to check: which model it is, sentence-transformers reads from the folder."""

    def calibration_batches(
        self, configs: Sequence[PruningConfig], model: Any, tokenizer: Any, n: int | None = None
    ) -> list[dict[str, Any]] | None:
        """Padded batches as the model itself reads texts; None if none of the configs needs data.

        Args:
            configs: The configs that will be used.
            model: The model of sentence-transformers.
            tokenizer: Not used: the model has its own.
            n: How many texts; by default ``calibration_samples``. A larger draw begins with the smaller one.

        Raises:
            ConfigError: If a criterion needs labels.
        """
        if not any(config.needs_data for config in configs):
            return None
        from hf_prune.calibration.sentences import sentence_batches
        from hf_prune.criteria.base import LABELLED
        from hf_prune.evaluation.data.classification import sample_order

        if needing := [config.criterion for config in configs if config.needs & LABELLED]:
            raise ConfigError(
                f"criterion {needing[0]!r} needs labels, and the scores of texts are none: choose one that learns from "
                f"texts alone, such as wanda, sparsegpt or fisher"
            )
        texts = self._unscored(model)
        chosen = [texts[i] for i in sample_order(len(texts))[: n or self.calibration_samples]]
        return sentence_batches(chosen, model, batch_size=16)

    @property
    def has_answers(self) -> bool:
        """False: similarities are no classes."""
        return False

    def metric_label(self, data: Dataset) -> str:
        """``"Spearman"`` or ``"nDCG@10"``."""
        return self._columns_of(data).metric

    def samples_seen(self, config: PruningConfig, reserve: int, model: Any = None) -> int:
        """How many texts, or pairs of a ``CrossEncoder``, calibration and a polish may see when others are held out.

        A polish sees as many as leave ``reserve`` pairs, or whole queries, unseen on average.

        Args:
            config: The config.
            reserve: How many pairs or queries to hold out, if there are that many.
            model: The model, which reads texts or pairs.
        """
        if config.polish is None:
            return self.calibration_samples
        samples = len(self._unscored(model))
        data = self.load(self.calibration_split)
        units = len(self._units(data, self._columns_of(data)))
        each = max(1.0, samples / units)  # of a unit, all unseen with probability (1 - share) ** each
        share = 1 - min(1.0, reserve / units) ** (1 / each)
        return max(self.calibration_samples, min(self.most_polished(), int(share * samples)))

    def held_out(self, n: int, seen: int | None = None, model: Any = None) -> Dataset:
        """Pairs, or queries with all their documents, that calibration did not see, in a fixed random order.

        The texts of a pair share no five words in a row with any text that was seen; neither do queries, and none of
        their documents was seen as a whole. (Long documents share some words with others almost always.)

        Args:
            n: How many pairs or queries; all that remain if there are fewer.
            seen: How many texts, or pairs of a ``CrossEncoder``, calibration and a polish see; by default
                ``calibration_samples``.
            model: The model, which reads texts or pairs.

        Raises:
            DataError: If none remains.
        """
        from hf_prune.evaluation.data.classification import sample_order

        data, seen = self.load(self.calibration_split), seen or self.calibration_samples
        samples = self._unscored(model)
        drawn = [samples[i] for i in sample_order(len(samples))[:seen]]
        known = {text for sample in drawn for text in ([sample] if isinstance(sample, str) else sample)}
        columns = self._columns_of(data)
        ranks = columns.metric == NDCG
        first, second = (column(data, name) for name in columns.texts)
        second_seen = [text in known for text in second] if ranks else overlapping(second, known)
        was_seen = [a or b for a, b in zip(overlapping(first, known), second_seen, strict=True)]
        units = self._units(data, columns)
        shuffled = [units[i] for i in sample_order(len(units))]
        unseen = [unit for unit in shuffled if not any(was_seen[row] for row in unit)]
        if not unseen:
            raise self._nothing_remains(f"{len(units):,} {'queries' if ranks else 'pairs'}", seen, True)
        return data.select([row for unit in unseen[:n] for row in unit])

    def _unscored(self, model: Any) -> list[Any]:
        """The texts, or pairs of a ``CrossEncoder``, from which calibration draws."""
        return load_unscored(self.source, self.calibration_split, self.text_columns, pairs=hasattr(model, "predict"))

    def _columns_of(self, data: Dataset) -> SentenceColumns:
        return sentence_columns(data.column_names, "the data set", **self.columns)

    @staticmethod
    def _units(data: Dataset, columns: SentenceColumns) -> list[list[int]]:
        """The rows that are scored together: those of a query, or each pair alone."""
        if columns.metric != NDCG:
            return [[i] for i in range(len(data))]
        units: dict[str, list[int]] = {}
        for i, query in enumerate(column(data, columns.texts[0])):
            units.setdefault(query, []).append(i)
        return list(units.values())

    def streaming_batches(
        self, tokenizer: Any, positions: int | None, label2id: Mapping[str, int] | None = None
    ) -> NoReturn:
        """Refuse: the model of sentence-transformers, which reads texts in its own way, is never loaded.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "--stream does not read texts as a model of sentence-transformers does: leave it out, or choose a "
            "criterion without data, such as magnitude"
        )

    def training_examples(self, split: str, model: Any, tokenizer: Any) -> NoReturn:
        """Refuse: how such a model is trained, sentence-transformers knows.

        Raises:
            DataError: Always.
        """
        raise DataError(
            "a model of sentence-transformers learns from its own losses: train it with the SentenceTransformerTrainer "
            "or CrossEncoderTrainer, and model.keep_sparse(optimizer) or a PruningCallback"
        )

    def data_collator(self, tokenizer: Any) -> None:
        """None: nothing is trained."""

    def score(
        self, model: Any, tokenizer: Any, split: str, *, source: str | None = None, **options: Any
    ) -> SentenceScore:
        """The score on a split.

        Args:
            model: A ``SentenceTransformer`` or a ``CrossEncoder``.
            tokenizer: Not used.
            split: Which split.
            source: What to call the data in the result.
            **options: Passed to :func:`hf_prune.evaluate_sentences`.
        """
        from hf_prune.evaluation.sentences import evaluate_sentences

        return evaluate_sentences(model, self.load_scored(split), **self.named(split, source), **options)

    def compare(self, dense: SentenceScore, pruned: SentenceScore) -> SentenceComparison:
        """Two scores on the same data, compared in pairs."""
        from hf_prune.evaluation.sentence_result import compare_sentences

        return compare_sentences(dense, pruned)
