"""What tasks share whose data are rows that are scored one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hf_prune.errors import DataError
from hf_prune.evaluation.data.overlap import overlapping
from hf_prune.planning.config import PruningConfig

if TYPE_CHECKING:
    from datasets import Dataset

POLISH_SAMPLES = 4096  # examples that a polish trains on; fewer teach it little


class ScoredRows(ABC):
    """Base of tasks with rows: which of them are scored, which are held out, and how many a polish sees.

    Attributes:
        source: A file, a folder or a Hub data set.
        calibration_split: The split that calibrated criteria learn from.
        calibration_samples: How many examples calibrated criteria see.
        limit: Score only this many examples, the first ones; None for all.
    """

    default_split: ClassVar[str] = "validation"  # to score

    source: str
    calibration_split: str
    calibration_samples: int
    limit: int | None

    @property
    @abstractmethod
    def columns(self) -> dict[str, Any]:
        """The columns, as keyword arguments of functions that take such data."""

    @abstractmethod
    def load(self, split: str) -> Dataset:
        """One split."""

    @abstractmethod
    def calibration_batches(
        self, configs: Sequence[PruningConfig], model: Any, tokenizer: Any, n: int | None = None
    ) -> list[dict[str, Any]] | None:
        """Batches that calibrated criteria learn from; None if none of the configs needs data."""

    @property
    @abstractmethod
    def has_answers(self) -> bool:
        """Whether scores keep what is predicted for each example, so that changed answers can be counted."""

    @abstractmethod
    def metric_label(self, data: Dataset) -> str:
        """What the metric is called in results, such as ``"entity F1"``.

        Raises:
            ConfigError: If there is no such metric.
        """

    @abstractmethod
    def held_out(self, n: int, seen: int | None = None, model: Any = None) -> Dataset:
        """Examples of the calibration split that calibration did not see, in a fixed random order.

        Args:
            n: How many; all that remain if there are fewer.
            seen: How many calibration and a polish see; by default ``calibration_samples``.
            model: The model, where it matters what it reads together.

        Raises:
            DataError: If none remains.
        """

    def load_scored(self, split: str) -> Dataset:
        """The rows of one split that are scored."""
        data = self.load(split)
        return data if self.limit is None else data.select(range(min(self.limit, len(data))))

    def polish_batches(
        self, configs: Sequence[PruningConfig], model: Any, tokenizer: Any, n: int | None = None
    ) -> list[dict[str, Any]] | None:
        """Batches for a polish, including those of :meth:`calibration_batches`; None if none of the configs has one.

        Args:
            configs: The configs that will be used.
            model: The model.
            tokenizer: Its tokenizer or processor.
            n: How many examples; by default 4,096 or ``calibration_samples``, whichever is more.
        """
        if all(config.polish is None for config in configs):
            return None
        return self.calibration_batches(configs, model, tokenizer, n or max(POLISH_SAMPLES, self.calibration_samples))

    @staticmethod
    def most_polished() -> int:
        """How many examples a polish trains on where there are as many."""
        return POLISH_SAMPLES

    def samples_seen(self, config: PruningConfig, reserve: int, model: Any = None) -> int:
        """How many examples calibration and a polish may see when others are held out.

        Args:
            config: The config.
            reserve: How many examples to hold out, if there are that many; a polish makes do with the rest.
            model: The model, where it matters what it reads together.
        """
        if config.polish is None:
            return self.calibration_samples
        rest = len(self.load(self.calibration_split)) - reserve
        return max(self.calibration_samples, min(self.most_polished(), rest))

    def _unseen(self, data: Dataset, texts: Sequence[str] | None, n: int, seen: int | None) -> Dataset:
        """Rows that calibration does not draw, and whose texts share no five words in a row with those it draws.

        Args:
            data: The calibration split.
            texts: What is read of each row; None if that is no text.
            n: How many rows, at most.
            seen: How many calibration and a polish see; by default ``calibration_samples``.

        Raises:
            DataError: If none remains.
        """
        from hf_prune.evaluation.data.classification import sample_order

        order, seen = sample_order(len(data)), seen or self.calibration_samples
        unseen = order[seen:]
        if texts is not None:
            overlaps = overlapping([texts[i] for i in unseen], [texts[i] for i in order[:seen]])
            unseen = [i for i, overlaps_seen in zip(unseen, overlaps, strict=True) if not overlaps_seen]
        if not unseen:
            raise self._nothing_remains(f"{len(data):,} examples", seen, texts is not None)
        return data.select(unseen[:n])

    def _nothing_remains(self, has: str, seen: int, texts: bool) -> DataError:
        """The error where nothing remains to score.

        Args:
            has: What the split has, with its number.
            seen: How much of it calibration may see.
            texts: Whether it has texts, which may share words.
        """
        shared = " that shares no five words in a row with those" if texts else ""
        return DataError(
            f"the split {self.calibration_split!r} of {self.source!r} has {has}, and calibration may see {seen:,}: "
            f"none remains to score{shared}; calibrate on fewer, or pass more data"
        )

    def named(self, split: str, source: str | None) -> dict[str, Any]:
        """What a score says of its data, as keyword arguments of functions that score.

        Args:
            split: The split that is scored; a file is one split by itself, which has no name.
            source: What to call the data; None for ``source``.
        """
        split_name = "" if Path(self.source).is_file() else split
        return {"source": source or self.source, "split": split_name, **self.columns}
