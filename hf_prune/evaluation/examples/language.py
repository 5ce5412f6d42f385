"""Causal language models, judged by the likelihood of each window of tokens, as for a perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_prune.calibration.texts import context_length, joined_tokens
from hf_prune.errors import DataError
from hf_prune.evaluation.examples.base import Columns, ExampleKind, choose_column
from hf_prune.evaluation.examples.metrics import TOKENS, Metric
from hf_prune.evaluation.likelihood import mean_nll, starts_with_bos
from hf_prune.utils.column_names import TEXTS
from hf_prune.utils.forward import no_cache, run_model

_WINDOW = 512  # tokens


class LanguageModeling(ExampleKind):
    """Texts, joined and cut into windows; a difference of one point is one percent of the perplexity."""

    name = "language-modeling"
    metrics: ClassVar[Mapping[str, Metric]] = TOKENS
    least_rows = 1  # which may be a whole book

    def columns(self, available: Sequence[str], where: str, texts: Sequence[str] | None, label: str | None) -> Columns:
        """One column of texts, which is also what the model should say."""
        text = choose_column(available, where, texts[0] if texts else None, TEXTS, "text_column")
        return Columns((), text)

    def check(self, model: Any, reader: Any) -> None:
        """Nothing to check: windows are not padded."""

    def longest(self, model: Any, reader: Any, wanted: int | None) -> int:
        """The tokens of a window: at most 512, and what the model has positions for."""
        return min(limit for limit in (wanted or _WINDOW, context_length(model)) if limit is not None)

    def encode(
        self, model: Any, reader: Any, rows: Sequence[Mapping[str, Any]], columns: Columns, longest: int
    ) -> list[dict[str, Any]]:
        """Full windows, however the texts were cut into rows."""
        tokens = joined_tokens([row[columns.label] for row in rows], reader)
        if len(tokens) < 2 * longest:
            raise DataError(
                f"the texts have {len(tokens):,} tokens: expected at least two windows of {longest:,}; pass more text"
            )
        lead = [reader.bos_token_id] if starts_with_bos(reader) else []
        if lead and tokens[0] == lead[0]:
            tokens = tokens[1:]  # it stands in each window, and not at the start of all text alone
        width = longest - len(lead)
        windows = tokens[: len(tokens) // width * width].view(-1, width)
        windows = torch.cat([torch.tensor([lead] * len(windows), dtype=torch.int64).view(len(windows), -1), windows], 1)
        return [{"inputs": {"input_ids": window}, "labels": window} for window in windows]

    def collate(
        self, model: Any, reader: Any, examples: Sequence[Mapping[str, Any]], labels: bool
    ) -> dict[str, Tensor]:
        """As one batch."""
        ids = torch.stack([example["labels"] for example in examples])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **({"labels": ids.clone()} if labels else {})}

    def answer(self, model: Any, reader: Any, batch: Mapping[str, Tensor]) -> Any:
        """The logits of every token."""
        return run_model(model, {**no_cache(model), **batch}, DataError)

    def judge(
        self, model: Any, reader: Any, outputs: Any, examples: Sequence[Mapping[str, Any]]
    ) -> list[Sequence[float]]:
        """The log-likelihood of all predicted tokens, and how many there are."""
        rows: list[Sequence[float]] = []
        for logits, example in zip(outputs.logits, examples, strict=True):
            count = len(example["labels"]) - 1
            likelihood = -float(mean_nll(logits[:-1], example["labels"][1:])) * count
            if not torch.isfinite(torch.tensor(likelihood)):
                raise DataError(
                    f"{type(model).__name__} gives likelihoods that are not finite: its weights are damaged"
                )
            rows.append([likelihood, count])
        return rows
