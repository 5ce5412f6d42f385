"""Data to calibrate on, for models without a task that is scored: sounds, images without classes, pairs of both."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.data.loading import read_split
from hf_prune.planning.config import PruningConfig

NO_TASK = (
    "expected one that classifies texts, tokens or images, answers questions, writes or predicts texts, or compares "
    "them; score it in Python"
)


@dataclass(frozen=True)
class RawTask:
    """Images or sounds for any model that reads them; nothing is scored.

    Args:
        source: A file, a folder or a Hub data set.
        calibration_split: The split that calibrated criteria learn from.
        calibration_samples: How many examples they see.
    """

    default_split: ClassVar[str] = "validation"

    source: str
    calibration_split: str = "train"
    calibration_samples: int = 128

    @property
    def columns(self) -> dict[str, Any]:
        """None are named."""
        return {}

    def check_model_class(self, source: str, name: str, *, labelled: bool = True) -> None:
        """Nothing to check: what the model cannot read is refused when it is read."""

    def calibration_batches(
        self, configs: Sequence[PruningConfig], model: Any, tokenizer: Any, n: int | None = None
    ) -> list[Any] | None:
        """Batches as the processor makes them, with labels if there are any; None if none of the configs needs data.

        Args:
            configs: The configs that will be used.
            model: The model.
            tokenizer: Its processor.
            n: How many examples; by default ``calibration_samples``.
        """
        if not any(config.needs_data for config in configs):
            return None
        from hf_prune.calibration.read import read_calibration
        from hf_prune.criteria.base import LABELLED
        from hf_prune.evaluation.data.classification import sample_order

        content, _ = read_split(os.fspath(self.source), self.calibration_split, texts=False)
        assert not isinstance(content, Path)
        chosen = content.select(sample_order(len(content))[: n or self.calibration_samples])
        labels = any(config.needs & LABELLED for config in configs)
        return read_calibration(model, chosen, tokenizer, labels=labels)

    def polish_batches(
        self, configs: Sequence[PruningConfig], model: Any, tokenizer: Any, n: int | None = None
    ) -> list[Any] | None:
        """Batches for a polish; None if it uses those of :meth:`calibration_batches`, or there is none."""
        if n is None or all(config.polish is None for config in configs):
            return None
        return self.calibration_batches(configs, model, tokenizer, n)

    def streaming_batches(
        self, tokenizer: Any, positions: int | None, label2id: Mapping[str, int] | None = None
    ) -> NoReturn:
        """Refuse: streaming reads texts.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "--stream reads texts alone: leave it out, or choose a criterion without data, such as magnitude"
        )

    def training_examples(self, split: str, model: Any, tokenizer: Any) -> NoReturn:
        """Refuse, as :meth:`score` does."""
        self._refuse()

    def data_collator(self, tokenizer: Any) -> None:
        """None: nothing is trained."""

    def score(self, model: Any, tokenizer: Any, split: str, **options: Any) -> NoReturn:
        """Refuse: it is not known what the model should say.

        Raises:
            DataError: Always.
        """
        self._refuse()

    def compare(self, dense: Any, pruned: Any) -> NoReturn:
        """Refuse, as :meth:`score` does."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise DataError(f"this model has no task that is scored or trained here: {NO_TASK}")
