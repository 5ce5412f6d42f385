"""Where texts are, and which of them calibration may see; describing them loads none of the large libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_prune.errors import DataError
from hf_prune.evaluation.data.checks import column
from hf_prune.evaluation.data.loading import load_classification, load_texts
from hf_prune.evaluation.data.overlap import overlapping
from hf_prune.planning.config import PruningConfig

if TYPE_CHECKING:
    from datasets import Dataset

POLISH_SAMPLES = 4096  # labelled texts that a polish trains on; fewer teach it little


@dataclass(frozen=True)
class LabelledData:
    """Where labelled texts are, and which of them calibration may see.

    Args:
        source: A file, a folder or a Hub data set, as for :func:`hf_prune.load_classification`.
        text_columns: One text column, or two for pairs.
        label_column: The label column.
        calibration_split: What calibrated criteria learn from.
        calibration_samples: How many examples they see.
    """

    source: str = "glue/sst2"
    text_columns: tuple[str, ...] = ("sentence",)
    label_column: str = "label"
    calibration_split: str = "train"
    calibration_samples: int = 128

    def load(self, split: str) -> Dataset:
        """One split."""
        return load_classification(self.source, split, text_columns=self.text_columns, label_column=self.label_column)

    def load_unlabelled(self, split: str) -> Dataset:
        """The texts of one split, whose labels are not looked at: of text files, a text for each line."""
        return load_classification(self.source, split, text_columns=self.text_columns, label_column=None)

    def held_out(self, n: int, seen: int | None = None) -> Dataset:
        """Examples of the calibration split that share no five words in a row with those that were seen.

        Data sets hold texts more than once, and parts of texts: those of SST-2 are cut from longer ones.

        Args:
            n: How many; all that are left if there are fewer.
            seen: How many examples calibration and a polish see; by default ``calibration_samples``.

        Raises:
            DataError: If none is left.
        """
        from hf_prune.evaluation.data.classification import sample_order

        data = self.load(self.calibration_split)
        columns = [column(data, name) for name in self.text_columns]
        texts = [" ".join(map(str, parts)) for parts in zip(*columns, strict=True)]
        order = sample_order(len(data))
        seen = seen or self.calibration_samples
        left = order[seen:]
        overlaps = overlapping([texts[i] for i in left], [texts[i] for i in order[:seen]])
        rows = [i for i, known in zip(left, overlaps, strict=True) if not known][:n]
        if not rows:
            raise DataError(
                f"the split {self.calibration_split!r} of {self.source!r} has {len(data):,} examples, and calibration "
                f"may see {seen:,}: none is left to score; calibrate on fewer, or pass more data"
            )
        return data.select(rows)

    def calibration(
        self, configs: Sequence[PruningConfig], model: Any, tokenizer: Any, n: int | None = None
    ) -> list[dict[str, Any]] | None:
        """Batches, if one of the configs needs them; with labels if a criterion needs them.

        Args:
            configs: The configs.
            model: The model.
            tokenizer: Its tokenizer.
            n: How many examples, if not ``calibration_samples``; these are among them.
        """
        if not any(config.needs_data for config in configs):
            return None
        from hf_prune.criteria.base import LABELLED
        from hf_prune.evaluation.data.classification import classification_batches

        label_column = self.label_column if any(config.needs & LABELLED for config in configs) else None
        return classification_batches(
            (self.load if label_column else self.load_unlabelled)(self.calibration_split),
            tokenizer,
            n=n or self.calibration_samples,
            text_columns=self.text_columns,
            label_column=label_column,
            label2id=model.config.label2id,
        )

    def for_polish(
        self, configs: Sequence[PruningConfig], model: Any, tokenizer: Any, n: int | None = None
    ) -> list[dict[str, Any]] | None:
        """Batches for a polish, if one of the configs has one; those of :meth:`calibration` are among them.

        Args:
            configs: The configs.
            model: The model.
            tokenizer: Its tokenizer.
            n: How many examples, if not 4,096 or ``calibration_samples``, whichever is more.
        """
        if all(config.polish is None for config in configs):
            return None
        return self.calibration(configs, model, tokenizer, n or max(POLISH_SAMPLES, self.calibration_samples))

    def seen(self, config: PruningConfig, spare: int) -> int:
        """How many examples calibration and a polish may see where others are to be held out.

        Args:
            config: The config.
            spare: How many are to be held out, if there are so many; the polish makes do with the rest.
        """
        if config.polish is None:
            return self.calibration_samples
        rest = len(self.load(self.calibration_split)) - spare
        return max(self.calibration_samples, min(POLISH_SAMPLES, rest))


@dataclass(frozen=True)
class TextData:
    """Where texts for a language model are, and which of them calibration may see.

    Args:
        source: A file, a folder or a Hub data set, as for :func:`hf_prune.load_texts`.
        text_column: The text column, where there are columns.
        calibration_split: What calibrated criteria learn from, where there are splits.
        calibration_samples: How many windows they see.
        window: Tokens of such a window; what the model has positions for if that is less.
    """

    source: str = "Salesforce/wikitext:wikitext-2-raw-v1"
    text_column: str = "text"
    calibration_split: str = "train"
    calibration_samples: int = 128
    window: int = 512

    def load(self, split: str) -> list[str]:
        """The texts of one split."""
        return load_texts(self.source, split, text_column=self.text_column)

    def calibration(
        self, configs: Sequence[PruningConfig], model: Any, tokenizer: Any, n: int | None = None
    ) -> list[dict[str, Any]] | None:
        """Windows of tokens, if one of the configs needs them; with labels if a criterion needs them.

        Args:
            configs: The configs.
            model: The model.
            tokenizer: Its tokenizer.
            n: How many windows, if not ``calibration_samples``.
        """
        if not any(config.needs_data for config in configs):
            return None
        from hf_prune.criteria.base import LABELLED
        from hf_prune.evaluation.data.classification import context_length
        from hf_prune.evaluation.data.texts import token_windows

        return token_windows(
            self.load(self.calibration_split),
            tokenizer,
            n=n or self.calibration_samples,
            length=min(self.window, context_length(model) or self.window),
            labels=any(config.needs & LABELLED for config in configs),
        )

    def for_polish(
        self, configs: Sequence[PruningConfig], model: Any, tokenizer: Any, n: int | None = None
    ) -> list[dict[str, Any]] | None:
        """Windows for a polish, if one of the configs has one and is to see others than :meth:`calibration` gives.

        Args:
            configs: The configs.
            model: The model.
            tokenizer: Its tokenizer.
            n: How many windows; None for those of calibration.
        """
        if n is None or all(config.polish is None for config in configs):
            return None
        return self.calibration(configs, model, tokenizer, n)
