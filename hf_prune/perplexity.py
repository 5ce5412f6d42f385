"""How well a causal language model predicts text, and how much worse a pruned one does on the same windows."""

from __future__ import annotations

import hashlib
import inspect
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_prune.config import check_positive
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation import context_length
from hf_prune.masking import warn_regrown
from hf_prune.progress import Bar
from hf_prune.running import eval_mode, on_device, run_model
from hf_prune.sums import sum_dtype
from hf_prune.texts import joined_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WINDOW = 2048  # tokens, where the model has no shorter context: with what most perplexities are published
_CHUNK = 1 << 23  # logits that are looked at in float32 at a time
_PROBE = 8  # tokens that show whether a model looks ahead
_MANY = 10_000  # degrees of freedom from which Student's t is normal
_EXPECTED = (
    "perplexity is that of a causal language model, with logits (batch, seq, vocab); load one with AutoModelForCausalLM"
)


# --- results ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Perplexity:
    """How well one model predicts one text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a predicted token; 1 is perfect.
        n: Number of windows.
        n_tokens: Number of predicted tokens.
        standard_error: Of the perplexity, from how the windows differ; None for one window. Windows count as
            independent, which those of one article are not quite.
        window_nll: Mean negative log-likelihood of the predicted tokens of each window, in nats, in text order.
        window_tokens: How many tokens are predicted in each window.
        window: Tokens that the model sees at once.
        stride: Tokens from the start of one window to that of the next.
        bos_in_every_window: Whether each window starts with the beginning-of-sequence token.
        unused_tokens: Tokens at the end of the text that fill no window, or lie beyond the limit.
        split: Name of the split.
        source: Where the text came from.
        data_fingerprint: Hash of the tokens.
        seconds: Wall time of tokenising and predicting.
        dtype: Of the weights, such as ``float32``; likelihoods are computed in float32 at least.
        batch_size: Windows per forward pass.
    """

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
        data = " ".join(part for part in (self.source, self.split) if part) or f"data {self.data_fingerprint}"
        error = "" if self.standard_error is None else f" ± {self.standard_error:.2f}"
        windows = "window" if self.n == 1 else "windows"
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
        names = {field.name for field in fields(cls)}
        if names != set(values):
            raise DataError(
                f"not a saved perplexity: missing {sorted(names - set(values))}, "
                f"unknown {sorted(set(values) - names)}: pass what Perplexity.to_dict returned"
            )
        lists = {name: tuple(values[name]) for name in ("window_nll", "window_tokens")}
        return cls(**{**values, **lists})


@dataclass(frozen=True)
class PerplexityComparison:
    """A pruned model against its dense parent on the same windows.

    Attributes:
        dense_perplexity: 1 or more.
        pruned_perplexity: 1 or more.
        ratio: ``pruned / dense``; above 1 if the pruned model is worse.
        ratio_standard_error: Of the ratio, paired over the windows; None for one window.
        interval: Two-sided confidence interval of the ratio; None for one window.
        n: Number of windows.
        confidence: Of the interval, 0 to 1.
    """

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


# --- evaluation ------------------------------------------------------------------------------------


def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    bos_in_every_window: bool = False,
    source: str = "",
    split: str = "",
    progress: bool | str = False,
) -> Perplexity:
    r"""Measure the perplexity of a causal language model, on the device and in the dtype it has.

    As published for WikiText-2 (Merity et al. 2016, arXiv:1609.07843): the texts are joined by ``"\n\n"``,
    tokenised once, and cut in consecutive windows. Every token of a window but the first is predicted from those
    before it in the window. What is left at the end and fills no window is not used. With a stride below the window,
    windows overlap: the tokens that the window before has predicted are only context then, and each token is still
    predicted once. The model runs in eval mode and gets its training flags back.

    A beginning-of-sequence token stands where the tokenizer puts it: once, at the start of all text. That is the
    convention, and right for models that do not care; for those that do (Gemma), set ``bos_in_every_window``.

    Args:
        model: A causal language model: ``logits`` of shape (batch, seq, vocab).
        tokenizer: Its tokenizer.
        texts: A list of texts, or a column of a data set; see :func:`hf_prune.load_texts`.
        window: Tokens that the model sees at once, at least 2. By default its context, at most 2048.
        stride: Tokens from the start of one window to that of the next; by default windows do not overlap.
        batch_size: Windows per forward pass. The logits take batch_size * window * vocabulary values of the
            model's dtype; their float32 copies are made piece by piece.
        limit: Use only the first so many windows.
        bos_in_every_window: Start each window with the BOS token, which takes one place of it and is not predicted;
            so all other tokens are.
        source: Where the text came from, for the record.
        split: Its split, for the record.
        progress: Show a progress bar on a terminal; a string is its title.

    Returns:
        The perplexity, what it was in each window, and how it was measured.

    Raises:
        ConfigError: If a setting is out of range, or the window is longer than the model's context.
        DataError: If the text is too short for one window; the model is no causal language model, does not belong to
            the tokenizer, or gives likelihoods that are not finite; or there is no BOS token where one is asked for.

    Example:
        >>> texts = load_texts("Salesforce/wikitext:wikitext-2-raw-v1", "test")  # doctest: +SKIP
        >>> print(evaluate_perplexity(model, tokenizer, texts, window=512, limit=40))  # doctest: +SKIP
        perplexity 22.35 ± 0.93 (n = 40 windows of 512 tokens, data 6b86b273ff34fce1)
    """
    warn_regrown(model, "what is scored is not the model that save_pretrained() writes, in which they are zero")
    if getattr(model.config, "is_encoder_decoder", False):
        raise DataError(f"{type(model).__name__} has an encoder: {_EXPECTED}")
    lead = _bos(tokenizer, bos_in_every_window)
    window, stride = _window(model, window, stride, len(lead))
    check_positive("batch_size", batch_size)
    if limit is not None:
        check_positive("limit", limit)
    start = time.perf_counter()
    tokens = joined_tokens(texts, tokenizer)
    if len(lead) and tokens[0] == lead[0]:
        tokens = tokens[1:]
    width = window - len(lead)
    if len(tokens) < width:
        raise DataError(
            f"the texts have {len(tokens):,} tokens, too few for one window of {window:,}: pass more text, or a "
            f"smaller window"
        )
    rows = tokens.unfold(0, width, stride)[:limit]  # (windows, width), a view
    used = (len(rows) - 1) * stride + width
    _check_tokens(model, tokens[:used])
    # What each window predicts: all it can in the first one, and then what the window before has not predicted.
    most = window - 1
    counts = [most, *[min(stride, most)] * (len(rows) - 1)]
    nlls = _window_nlls(model, rows, lead, counts, batch_size, progress)
    mean = math.fsum(nll * count for nll, count in zip(nlls, counts, strict=True)) / sum(counts)
    error = _standard_error(nlls, counts)
    perplexity = _exp(mean)
    return Perplexity(
        perplexity=perplexity,
        n=len(rows),
        n_tokens=sum(counts),
        standard_error=None if error is None else perplexity * error,
        window_nll=tuple(nlls),
        window_tokens=tuple(counts),
        window=window,
        stride=stride,
        bos_in_every_window=bos_in_every_window,
        unused_tokens=len(tokens) - used,
        split=split,
        source=source,
        data_fingerprint=hashlib.sha256(tokens[:used].numpy().tobytes()).hexdigest()[:16],
        seconds=time.perf_counter() - start,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        batch_size=batch_size,
    )


def compare_perplexity(dense: Perplexity, pruned: Perplexity, *, confidence: float = 0.95) -> PerplexityComparison:
    """Compare two models on the same windows: the ratio of their perplexities, and how sure it is.

    The log of the ratio is the mean difference of the log-likelihoods. Its error is the paired one, from how that
    difference varies between windows, which is usually much smaller than the errors of the two perplexities suggest;
    the interval is Student's t with n - 1 degrees of freedom, on the log scale. Windows count as independent draws.

    Args:
        dense: Result of the dense model.
        pruned: Result of the pruned model on the same text, with the same windows.
        confidence: Of the two-sided interval, between 0 and 1.

    Returns:
        The ratio, its standard error and its interval.

    Raises:
        ConfigError: If ``confidence`` is not between 0 and 1.
        DataError: If the two are not on the same windows.

    Example:
        >>> print(compare_perplexity(dense, pruned))  # doctest: +SKIP
        perplexity 22.35 -> 28.10: 1.2573 ± 0.0081 times the dense one (95 % interval 1.2410 to 1.2738, paired, ...
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence!r}: expected a number between 0 and 1, such as 0.95")
    _check_paired(dense, pruned)
    weights = dense.window_tokens
    differences = [b - a for a, b in zip(dense.window_nll, pruned.window_nll, strict=True)]
    log_ratio = math.fsum(d * w for d, w in zip(differences, weights, strict=True)) / sum(weights)
    error = _standard_error(differences, weights)
    ratio, interval = _exp(log_ratio), None
    if error is not None:
        half = student_t(confidence, dense.n - 1) * error
        interval = _exp(log_ratio - half), _exp(log_ratio + half)
    return PerplexityComparison(
        dense_perplexity=dense.perplexity,
        pruned_perplexity=pruned.perplexity,
        ratio=ratio,
        ratio_standard_error=None if error is None else ratio * error,
        interval=interval,
        n=dense.n,
        confidence=confidence,
    )


# --- steps -----------------------------------------------------------------------------------------


def _bos(tokenizer: PreTrainedTokenizerBase, asked: bool) -> Tensor:
    """(1,) with the BOS token, or (0,) if none is asked for."""
    if not asked:
        return torch.tensor([], dtype=torch.int64)
    if tokenizer.bos_token_id is None:
        raise DataError(
            f"bos_in_every_window is set, but {type(tokenizer).__name__} has no BOS token: leave it out, or set "
            f"tokenizer.bos_token"
        )
    return torch.tensor([tokenizer.bos_token_id])


def _window(model: PreTrainedModel, window: int | None, stride: int | None, lead: int) -> tuple[int, int]:
    """Both lengths, checked."""
    context = context_length(model)
    if window is None:
        window = _WINDOW if context is None else min(_WINDOW, context)
    check_positive("window", window)
    if window < 2:
        raise ConfigError(f"window is {window}: expected at least 2 tokens, of which the second is predicted")
    if context is not None and window > context:
        raise ConfigError(f"window is {window}: {type(model).__name__} has only {context} positions")
    longest = window - lead
    if stride is None:
        return window, longest
    check_positive("stride", stride)
    if stride > longest:
        raise ConfigError(
            f"stride is {stride}: expected at most the {longest} tokens of text in a window, else some are in none"
        )
    return window, stride


def _check_tokens(model: PreTrainedModel, tokens: Tensor) -> None:
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and int(tokens.max()) >= known:
        raise DataError(
            f"the tokenizer gives token {int(tokens.max())}, but {type(model).__name__} knows {known} tokens: load the "
            f"tokenizer of this model"
        )


def _window_nlls(
    model: PreTrainedModel,
    rows: Tensor,
    lead: Tensor,
    counts: Sequence[int],
    batch_size: int,
    progress: bool | str,
) -> list[float]:
    """Mean negative log-likelihood of the last so many tokens of each window."""
    title = progress if isinstance(progress, str) else "Scoring"
    starts = range(0, len(rows), batch_size)
    means: list[Tensor] = []
    with eval_mode(model), torch.inference_mode():
        _check_causal(model, torch.cat([lead, rows[0]])[:_PROBE])
        for start in Bar(starts, desc=title, progress=bool(progress)):
            part = rows[start : start + batch_size]
            ids = torch.cat([lead.expand(len(part), -1), part], 1)  # (batch, window)
            for row, logits, count in zip(ids, _logits(model, ids), counts[start : start + batch_size], strict=True):
                means.append(_nlls(logits[-count - 1 : -1], row[-count:]))
    found = torch.stack(means).tolist()
    if bad := sum(not math.isfinite(nll) for nll in found):
        raise DataError(
            f"{type(model).__name__} gives likelihoods that are not finite in {bad} of {len(found)} windows: its "
            f"weights are damaged, or its dtype overflows (load it in float32 or bfloat16)"
        )
    return found


def _nlls(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood, a few positions at a time.

    Args:
        logits: (seq, vocab).
        targets: (seq,).
    """
    step = max(1, _CHUNK // logits.shape[1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    total = torch.zeros((), dtype=sum_dtype(logits.device), device=logits.device)
    for part, target in zip(logits.split(step), targets.to(logits.device).split(step), strict=True):
        total += torch.nn.functional.cross_entropy(part.to(dtype), target, reduction="none").to(total.dtype).sum()
    return total / len(targets)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(batch, seq, vocab)."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    logits = getattr(run_model(model, {**on_device(model, {"input_ids": ids}), **options}, DataError), "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape or logits.shape[-1] <= int(ids.max()):
        found = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no logits"
        raise DataError(f"{type(model).__name__} returns {found} for {tuple(ids.shape)} tokens: {_EXPECTED}")
    return logits


def _check_causal(model: PreTrainedModel, tokens: Tensor) -> None:
    """Change the last token: what a model predicts before it must stay, or it has seen what it is to predict."""
    changed = tokens.clone()
    changed[-1] = 0 if tokens[-1] else 1
    one, other = _logits(model, torch.stack([tokens, changed]))[:, :-1].float()
    tolerance = max(1e-4, 4 * torch.finfo(next(model.parameters()).dtype).eps)
    if (one - other).abs().max() > tolerance * one.abs().max():
        raise DataError(f"{type(model).__name__} looks at the tokens that it is to predict: {_EXPECTED}")


def _check_paired(dense: Perplexity, pruned: Perplexity) -> None:
    for name in ("window", "stride", "bos_in_every_window", "n"):
        if (a := getattr(dense, name)) != (b := getattr(pruned, name)):
            raise DataError(f"the results have different windows ({name} {a} and {b}): evaluate both in the same way")
    if dense.data_fingerprint != pruned.data_fingerprint:
        raise DataError(
            f"the results are on different tokens (fingerprints {dense.data_fingerprint} and "
            f"{pruned.data_fingerprint}): evaluate both models on the same texts with the same tokenizer"
        )


def _standard_error(values: Sequence[float], weights: Sequence[int]) -> float | None:
    """Of a mean of independent values whose weights are given: for equal weights s / sqrt(n)."""
    n, total = len(values), sum(weights)
    if n < 2:
        return None
    mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total
    squares = math.fsum((w / total * (v - mean)) ** 2 for v, w in zip(values, weights, strict=True))
    return math.sqrt(n / (n - 1) * squares)


def _exp(x: float) -> float:
    return math.exp(x) if x < math.log(1.7e308) else math.inf


def student_t(confidence: float, degrees: int) -> float:
    """Within how many standard errors Student's t lies with this confidence.

    From the finite series of its distribution for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and
    26.7.4), by bisection.

    Args:
        confidence: Two-sided, between 0 and 1.
        degrees: Of freedom, at least 1; from 10,000 on it is normal.

    Example:
        >>> f"{student_t(0.95, 1):.3f} {student_t(0.95, 10):.3f} {student_t(0.95, 20000):.3f}"
        '12.706 2.228 1.960'
    """
    if degrees >= _MANY:
        from statistics import NormalDist

        return NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """Probability that |t| is at most sqrt(degrees) * tan(angle)."""
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    series = 0.0
    for k in range(1 + odd, degrees, 2):
        series += term
        term *= square * k / (k + 1)
    return 2 / math.pi * (angle + sine * series) if odd else sine * series
