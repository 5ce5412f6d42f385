"""Texts for causal language models. Describing the task loads none of the large libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hf_prune.errors import DataError
from hf_prune.evaluation.data.documents import load_documents
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.expectations import is_language_model
from hf_prune.utils.formatting import display_name

if TYPE_CHECKING:
    from hf_prune.evaluation.generation_result import Generation, GenerationComparison
    from hf_prune.evaluation.perplexity_result import Perplexity, PerplexityComparison

_HELD_OUT = 0.25  # of the texts, where some are learned from and others scored


@dataclass(frozen=True)
class LanguageModelingTask:
    """Texts or conversations for a causal language model, scored by perplexity.

    Conversations are written out by the tokenizer's chat template.

    Args:
        source: A file, a folder or a Hub data set, as for :func:`hf_prune.load_texts`.
        text_column: The column of texts or conversations, where there are columns; None for the one with a usual name.
        calibration_split: The split that calibrated criteria learn from, where there are splits.
        calibration_samples: How many windows of tokens they see.
        window: Tokens in such a window; fewer if the model has fewer positions.
    """

    default_split: ClassVar[str] = "test"  # to score

    source: str = ""
    text_column: str | None = None
    calibration_split: str = "train"
    calibration_samples: int = 128
    window: int = 512

    def load(self, split: str) -> list[Any]:
        """The texts of one split, or its conversations: lists of messages with ``role`` and ``content``."""
        return load_documents(self.source, split, self.text_column)

    def check_model_class(self, source: str, name: str, *, labelled: bool = True) -> None:
        """Make sure that a model is of this task; see :meth:`ClassificationTask.check_model_class`.

        Raises:
            DataError: If it is not a causal language model.
        """
        if name and not is_language_model(name):
            raise DataError(f"{source!r} is a {name}: expected a …ForCausalLM")

    def calibration_batches(
        self, configs: Sequence[PruningConfig], model: Any, tokenizer: Any, n: int | None = None
    ) -> list[dict[str, Any]] | None:
        """Windows of tokens, with labels if a criterion needs them; None if none of the configs needs data.

        Args:
            configs: The configs that will be used.
            model: The model.
            tokenizer: Its tokenizer.
            n: How many windows; by default ``calibration_samples``.
        """
        if not any(config.needs_data for config in configs):
            return None
        from hf_prune.criteria.base import LABELLED
        from hf_prune.evaluation.data.classification import context_length

        labels = any(config.needs & LABELLED for config in configs)
        return self._windows(
            self.calibration_split, tokenizer, context_length(model), n=n or self.calibration_samples, labels=labels
        )

    def learned_and_held_out(self) -> tuple[list[Any], list[Any]]:
        """The data of the calibration split, parted: what to learn from, and the last quarter, to score.

        Raises:
            DataError: If there is a single line or conversation.
        """
        texts = self.load(self.calibration_split)
        unit = "line" if isinstance(texts[0], str) else "conversation"
        if len(texts) == 1 and unit == "line":  # a file of plain text
            texts = texts[0].splitlines(keepends=True)
        rest = max(1, round(len(texts) * _HELD_OUT))
        if rest == len(texts):
            raise DataError(
                f"the split {self.calibration_split!r} of {self.source!r} is a single {unit}: expected more, some "
                f"to learn from and others to score"
            )
        return texts[:-rest], texts[-rest:]

    def learned_windows(
        self, texts: Sequence[Any], configs: Sequence[PruningConfig], model: Any, tokenizer: Any
    ) -> list[dict[str, Any]] | None:
        """Windows of some texts, as :meth:`calibration_batches` gives them of all.

        Args:
            texts: What is learned from.
            configs: The configs that will be used.
            model: The model.
            tokenizer: Its tokenizer.
        """
        if not any(config.needs_data for config in configs):
            return None
        from hf_prune.calibration.texts import token_windows
        from hf_prune.criteria.base import LABELLED

        labels = any(config.needs & LABELLED for config in configs)
        n = self.calibration_samples
        return token_windows(texts, tokenizer, n=n, length=self.window_of(model), labels=labels)

    def window_of(self, model: Any) -> int:
        """Tokens of a window of this model: fewer than asked for if it has fewer positions."""
        from hf_prune.evaluation.data.classification import context_length

        return min(self.window, context_length(model) or self.window)

    def polish_batches(
        self, configs: Sequence[PruningConfig], model: Any, tokenizer: Any, n: int | None = None
    ) -> list[dict[str, Any]] | None:
        """Windows for a polish; None if it uses those of :meth:`calibration_batches`, or none of the configs has one.

        Args:
            configs: The configs that will be used.
            model: The model.
            tokenizer: Its tokenizer.
            n: How many windows; None for those of calibration.
        """
        if n is None or all(config.polish is None for config in configs):
            return None
        return self.calibration_batches(configs, model, tokenizer, n)

    def streaming_batches(
        self, tokenizer: Any, positions: int | None, label2id: Mapping[str, int] | None = None
    ) -> list[dict[str, Any]]:
        """Calibration batches for a model that is never loaded as a whole.

        Args:
            tokenizer: The model's tokenizer.
            positions: How many tokens the model has positions for, if it says so.
            label2id: Not None if the batches need labels, which are the tokens themselves.
        """
        labels = label2id is not None
        return self._windows(self.calibration_split, tokenizer, positions, n=self.calibration_samples, labels=labels)

    def training_examples(self, split: str, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
        """All full windows of a split as a ``Trainer`` takes them, with labels."""
        from hf_prune.evaluation.data.classification import context_length

        windows = self._windows(split, tokenizer, context_length(model), n=1 << 40, batch_size=1, labels=True)
        return [{name: tensor[0] for name, tensor in window.items()} for window in windows]

    def data_collator(self, tokenizer: Any) -> None:
        """None: windows have one length, so the ``Trainer``'s own collator will do."""

    def score(self, model: Any, tokenizer: Any, split: str, *, source: str | None = None, **options: Any) -> Perplexity:
        """The perplexity on a split.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            split: Which split, where there are splits.
            source: What to call the data in the result.
            **options: Passed to :func:`hf_prune.evaluate_perplexity`.
        """
        from hf_prune.evaluation.perplexity import evaluate_perplexity

        return evaluate_perplexity(model, tokenizer, self.load(split), **self._named(split, source), **options)

    def compare(self, dense: Perplexity, pruned: Perplexity) -> PerplexityComparison:
        """Two scores on the same windows, compared in pairs."""
        from hf_prune.evaluation.perplexity import compare_perplexity

        return compare_perplexity(dense, pruned)

    def write(self, model: Any, tokenizer: Any, split: str, *, source: str | None = None, **options: Any) -> Generation:
        """What a model writes after prompts from a split.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            split: Which split, where there are splits.
            source: What to call the data in the result.
            **options: Passed to :func:`hf_prune.evaluate_generation`.
        """
        from hf_prune.evaluation.generation import evaluate_generation

        return evaluate_generation(model, tokenizer, self.load(split), **self._named(split, source), **options)

    def compare_written(self, dense: Generation, pruned: Generation) -> GenerationComparison:
        """What two models wrote after the same prompts, compared."""
        from hf_prune.evaluation.generation import compare_generation

        return compare_generation(dense, pruned)

    def _named(self, split: str, source: str | None) -> dict[str, Any]:
        """What a result says of its data; a file is one split by itself, which has no name."""
        return {
            "source": source or display_name(self.source),
            "split": "" if Path(self.source).is_file() else split,
        }

    def _windows(self, split: str, tokenizer: Any, positions: int | None, **options: Any) -> list[dict[str, Any]]:
        from hf_prune.calibration.texts import token_windows

        length = min(self.window, positions or self.window)
        return token_windows(self.load(split), tokenizer, length=length, **options)
