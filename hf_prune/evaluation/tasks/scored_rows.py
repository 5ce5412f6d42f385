"""What tasks share whose data are rows that are scored one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hf_prune.planning.config import PruningConfig

if TYPE_CHECKING:
    from datasets import Dataset

POLISH_SAMPLES = 4096  # examples that a polish trains on; fewer teach it little


class ScoredRows(ABC):
    """Base of tasks with rows: which of them are scored, and how many a polish sees.

    Attributes:
        source: A file, a folder or a Hub data set.
        calibration_samples: How many examples calibrated criteria see.
        limit: Score only this many examples, the first ones; None for all.
    """

    default_split: ClassVar[str] = "validation"  # to score

    source: str
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

    def named(self, split: str, source: str | None) -> dict[str, Any]:
        """What a score says of its data, as keyword arguments of functions that score.

        Args:
            split: The split that is scored; a file is one split by itself, which has no name.
            source: What to call the data; None for ``source``.
        """
        split_name = "" if Path(self.source).is_file() else split
        return {"source": source or self.source, "split": split_name, **self.columns}
