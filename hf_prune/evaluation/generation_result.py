"""What a language model writes after prompts, and the comparison of two models on the same prompts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_prune.errors import DataError
from hf_prune.evaluation.saved_scores import check_fields, data_name
from hf_prune.utils.results import Result

PER_PROMPT = ("prompts", "texts", "tokens")  # fields of a Generation that have an entry for each prompt
_SHOWN = 400  # characters of a text in a printed sample


@dataclass(frozen=True, repr=False)
class Generation(Result):
    """What a language model writes after prompts, the likeliest token each time.

    Attributes:
        distinct: Mean share of the runs of four tokens in a continuation that occur in it for the first time: 1 where
            nothing repeats (1 - seq-rep-4 of Welleck et al. 2020, arXiv:1908.04319). Continuations of fewer than four
            tokens have no such share and are not in the mean; None if all are that short.
        standard_error: Of that mean, over the prompts; None for one prompt.
        n: Number of prompts.
        short: How many continuations have fewer than four tokens.
        mean_tokens: Mean number of tokens written.
        new_tokens: The most tokens written after a prompt; fewer where the model ends its text.
        prompt_tokens: The most tokens of a prompt, without those of a chat template.
        chat: Whether prompts are messages of a user, in the model's chat template.
        prompts: The prompts, as the model reads them.
        texts: What it writes after each.
        tokens: The same as token ids, the end of the text included.
        split: Name of the split.
        source: Where the prompts came from.
        data_fingerprint: Hash of the tokens of the prompts.
        seconds: Wall time of tokenising and writing.
        dtype: Of the weights, such as ``float32``.
        batch_size: The most prompts continued at once.
    """

    bars = ("distinct",)

    distinct: float | None
    standard_error: float | None
    n: int
    short: int
    mean_tokens: float
    new_tokens: int
    prompt_tokens: int
    chat: bool
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    split: str
    source: str
    data_fingerprint: str
    seconds: float
    dtype: str
    batch_size: int

    def __str__(self) -> str:
        """One line: how much is repeated, n, and the data."""
        error = "" if self.standard_error is None else f" ± {100 * self.standard_error:.1f}"
        kind = "chat prompts" if self.chat else "prompts"
        share = "no" if self.distinct is None else f"{100 * self.distinct:.1f}{error} % distinct"
        short = f", {self.short} of the texts too short to count" if self.short else ""
        return (
            f"{share} 4-grams (greedy, {self.mean_tokens:.0f} tokens after each of {self.n} {kind}{short}, "
            f"{data_name(self)})"
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        lists = {"prompts": list(self.prompts), "texts": list(self.texts), "tokens": [list(row) for row in self.tokens]}
        return {**values, **lists}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Generation:
        """The inverse of ``to_dict``.

        Raises:
            DataError: If a field is missing or unknown, or there is not one entry for each prompt.
        """
        check_fields(cls, values, "generation")
        if any(not isinstance(values[name], list | tuple) or len(values[name]) != values["n"] for name in PER_PROMPT):
            raise DataError(f"not a saved generation: expected n = {values['n']!r} prompts, texts and rows of tokens")
        rows = {name: tuple(values[name]) for name in ("prompts", "texts")}
        return cls(**{**values, **rows, "tokens": tuple(tuple(map(int, row)) for row in values["tokens"])})


@dataclass(frozen=True)
class Sample:
    """What two models write after one prompt.

    Args:
        prompt: The prompt.
        dense: What the dense model writes.
        pruned: What the pruned model writes.
        equal_tokens: How many tokens are the same until the two part.
    """

    prompt: str
    dense: str
    pruned: str
    equal_tokens: int

    def __str__(self) -> str:
        """Four lines."""
        texts = [f"{name}: {_one_line(text)}" for name, text in (("dense ", self.dense), ("pruned", self.pruned))]
        return "\n  ".join([f"prompt: {_one_line(self.prompt)}", *texts, f"same for {self.equal_tokens} tokens"])


@dataclass(frozen=True, repr=False)
class GenerationComparison(Result):
    """What a pruned model writes, compared with what the dense one writes after the same prompts.

    Attributes:
        equal_tokens: Mean number of tokens that are the same until the two texts part.
        equal_tokens_standard_error: Of that mean; None for one prompt.
        identical: Prompts after which both write the same from beginning to end.
        token_f1: Mean F1 of the tokens of both texts, whatever their order (as for answers in SQuAD, Rajpurkar et al.
            2016); 1 if they are the same.
        token_f1_standard_error: Of that mean; None for one prompt.
        dense_distinct: Share of distinct 4-grams of the dense model, see :class:`Generation`.
        pruned_distinct: The same of the pruned model.
        distinct_change: Mean of ``pruned - dense`` over the prompts after which both write at least four tokens; below
            0 if the pruned model repeats itself more. None if there is no such prompt.
        interval: Two-sided confidence interval of the change, paired over these prompts; None for fewer than two.
        dense_short: Continuations of the dense model with fewer than four tokens.
        pruned_short: Those of the pruned model.
        dense_tokens: Mean number of tokens that the dense model writes.
        pruned_tokens: The same of the pruned model.
        n: Number of prompts.
        new_tokens: The most tokens written after each.
        confidence: Of the interval, 0 to 1.
        samples: Prompts with both texts: those with the fewest, the median and the most equal tokens.
    """

    bars = ("token_f1", "dense_distinct", "pruned_distinct")

    equal_tokens: float
    equal_tokens_standard_error: float | None
    identical: int
    token_f1: float
    token_f1_standard_error: float | None
    dense_distinct: float | None
    pruned_distinct: float | None
    distinct_change: float | None
    interval: tuple[float, float] | None
    dense_short: int
    pruned_short: int
    dense_tokens: float
    pruned_tokens: float
    n: int
    new_tokens: int
    confidence: float
    samples: tuple[Sample, ...]

    def __str__(self) -> str:
        """The scores in a line, and the samples."""
        return "\n".join([self.summary(), *(f"\n  {sample}" for sample in self.samples)])

    def summary(self) -> str:
        """One line: how long both write the same, the overlap of their tokens, and how much each repeats itself."""
        interval = "no interval"
        if self.interval is not None:
            low, high = (100 * bound for bound in self.interval)
            interval = f"{100 * self.confidence:g} % interval {low:+.1f} to {high:+.1f} points, paired"
        return (
            f"greedy text: {_with_error(self.equal_tokens, self.equal_tokens_standard_error, 1)} of {self.new_tokens} "
            f"tokens equal until they part ({self.identical} of {self.n} texts wholly), token F1 "
            f"{_with_error(self.token_f1, self.token_f1_standard_error, 3)}, distinct 4-grams "
            f"{percent(self.dense_distinct)} -> {percent(self.pruned_distinct)} ({interval}, n = {self.n} prompts), "
            f"{self.dense_tokens:.1f} -> {self.pruned_tokens:.1f} tokens a text{self._short()}"
        )

    def _short(self) -> str:
        if not self.dense_short and not self.pruned_short:
            return ""
        return f", {self.dense_short} -> {self.pruned_short} texts too short to have 4-grams"

    def rows(self) -> list[dict[str, Any]]:
        """One row: the scores without the samples."""
        values = self.to_dict()
        low, high = self.interval or (math.nan, math.nan)
        return [{**{k: v for k, v in values.items() if k not in ("samples", "interval")}, "low": low, "high": high}]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        interval = None if self.interval is None else list(self.interval)
        return {**values, "interval": interval, "samples": [dataclasses.asdict(sample) for sample in self.samples]}


def percent(share: float | None) -> str:
    """A share as it is shown; "none" if there is none."""
    return "none" if share is None else f"{100 * share:.1f} %"


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _one_line(text: str) -> str:
    shown = " ".join(text.split())
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
