"""The perplexity of a model, and the comparison of two, with the windows that they were measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf_prune.evaluation.saved_scores import check_fields, data_name
from hf_prune.utils.results import Result


@dataclass(frozen=True, repr=False)
class Perplexity(Result):
    """How well a model predicts a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a predicted token; 1 is perfect.
        n: Number of windows.
        n_tokens: Number of predicted tokens.
        standard_error: Standard error of the perplexity, from the variance between windows; None for one window.
            Windows count as independent, although windows of one article are not quite.
        window_nll: Mean negative log-likelihood of the predicted tokens of each window, in nats, in text order.
        window_tokens: How many tokens are predicted in each window.
        window: Tokens in a window, which the model sees at once.
        stride: Tokens from the start of one window to that of the next.
        bos_in_every_window: Whether each window starts with the beginning-of-sequence token.
        unused_tokens: Tokens at the end of the text that do not fill a window, or are beyond the limit.
        split: Name of the split.
        source: Where the text came from.
        data_fingerprint: Hash of the tokens.
        seconds: Wall time of tokenising and predicting.
        dtype: Of the weights, such as ``float32``; likelihoods are computed in float32 at least.
        batch_size: Windows per forward pass.
    """

    bars = ("perplexity",)

    perplexity: float
    n: int
    n_tokens: int
    standard_error: float | None
    window_nll: tuple[float, ...]
    window_tokens: tuple[int, ...]
    window: int
    stride: int
    bos_in_every_window: bool
    unused_tokens: int
    split: str
    source: str
    data_fingerprint: str
    seconds: float
    dtype: str
    batch_size: int

    def __str__(self) -> str:
        """One line: perplexity and standard error, n, and the data."""
        error = "" if self.standard_error is None else f" ± {self.standard_error:.2f}"
        windows = "window" if self.n == 1 else "windows"
        data = data_name(self)
        return f"perplexity {self.perplexity:.2f}{error} (n = {self.n} {windows} of {self.window} tokens, {data})"

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "window_nll": list(self.window_nll), "window_tokens": list(self.window_tokens)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Perplexity:
        """The inverse of ``to_dict``.

        Raises:
            DataError: If a field is missing or unknown.
        """
        check_fields(cls, values, "perplexity")
        lists = {name: tuple(values[name]) for name in ("window_nll", "window_tokens")}
        return cls(**{**values, **lists})


@dataclass(frozen=True, repr=False)
class PerplexityComparison(Result):
    """A pruned model compared with the dense one on the same windows.

    Attributes:
        dense_perplexity: 1 or more.
        pruned_perplexity: 1 or more.
        ratio: ``pruned / dense``; above 1 if the pruned model is worse.
        ratio_standard_error: Of the ratio, paired over the windows; None for one window.
        interval: Two-sided confidence interval of the ratio; None for one window.
        n: Number of windows.
        confidence: Of the interval, 0 to 1.
    """

    bars = ("dense_perplexity", "pruned_perplexity")

    dense_perplexity: float
    pruned_perplexity: float
    ratio: float
    ratio_standard_error: float | None
    interval: tuple[float, float] | None
    n: int
    confidence: float

    def __str__(self) -> str:
        """One line: both perplexities, their ratio with its interval, and n."""
        if self.ratio_standard_error is None or self.interval is None:
            error, interval = "", "one window: no interval"
        else:
            error, (low, high) = f" ± {self.ratio_standard_error:.4f}", self.interval
            interval = f"{100 * self.confidence:g} % interval {low:.4f} to {high:.4f}, paired, n = {self.n} windows"
        return (
            f"perplexity {self.dense_perplexity:.2f} -> {self.pruned_perplexity:.2f}: "
            f"{self.ratio:.4f}{error} times the dense one ({interval})"
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "interval": None if self.interval is None else list(self.interval)}


def exp_or_inf(x: float) -> float:
    """``exp(x)``, or infinity where that is too large for a float."""
    return math.exp(x) if x < math.log(1.7e308) else math.inf
