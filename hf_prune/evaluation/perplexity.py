"""Measure the perplexity of a causal language model, and compare a pruned model with the dense one."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_prune.calibration.texts import joined_tokens
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.data.classification import context_length
from hf_prune.evaluation.likelihood import CAUSAL, check_causal, mean_nll, starts_with_bos, token_logits
from hf_prune.evaluation.perplexity_result import Perplexity, PerplexityComparison, exp_or_inf
from hf_prune.evaluation.statistics import check_confidence, standard_error_of, student_t
from hf_prune.planning.checks import check_positive
from hf_prune.pruning.mask_store import warn_regrown
from hf_prune.utils.forward import eval_mode, is_encoder_decoder
from hf_prune.utils.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WINDOW = 2048  # tokens, or the context of the model if that is shorter: most perplexities are published with it


def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Any],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    bos_in_every_window: bool | None = None,
    source: str = "",
    split: str = "",
    progress: bool | str | None = None,
) -> Perplexity:
    r"""Measure the perplexity of a causal language model, on the device and in the dtype it has.

    As published for WikiText-2 (Merity et al. 2016, arXiv:1609.07843): the texts are joined by ``"\n\n"``,
    tokenized once, and cut into consecutive windows. Every token of a window but the first is predicted from the tokens
    before it in the window. Tokens at the end that do not fill a window are not used. With a stride below the window
    length, windows overlap: tokens that the window before has predicted are only context, so that each token is still
    predicted once. The model runs in eval mode, and its training flags are restored.

    Each window starts with the beginning-of-sequence token (BOS) if the model was trained so, which its tokenizer
    tells: whether it puts one before every text (Llama, Gemma, OPT) or not (GPT-2, Qwen, SmolLM2). Most published
    perplexities have it at the start of all text alone, or not at all: ``bos_in_every_window=False``.

    Scripts differ by more than some prunings cost. SmolLM2-135M-Instruct on the first 24 windows of 512 tokens of
    WikiText-2's test split has 32.88 here, 32.60 with the file's text as it stands (one line end between lines, not
    three), 32.33 without blank lines, and 31.04 without blank lines and spaces at the ends of lines. Compare numbers of
    one script only.

    Args:
        model: A causal language model: ``logits`` of shape (batch, seq, vocab).
        tokenizer: Its tokenizer.
        texts: A list of texts, or a column of a data set; see :func:`hf_prune.load_texts`. Or conversations, lists of
            messages with ``role`` and ``content``, which the tokenizer's chat template writes out one after the other.
        window: Tokens that the model sees at once, at least 2. By default its context, at most 2048.
        stride: Tokens from the start of one window to that of the next; by default windows do not overlap.
        batch_size: Windows per forward pass. The logits take batch_size * window * vocabulary values of the
            model's dtype; their float32 copies are made piece by piece.
        limit: Use only the first so many windows.
        bos_in_every_window: Start each window with the BOS token, which takes one place of it and is not predicted;
            so all other tokens are. None: if the tokenizer starts every text with it.
        source: Where the text came from, for the record.
        split: Its split, for the record.
        progress: Show a progress bar on a terminal; a string is its title.

    Returns:
        The perplexity, what it was in each window, and how it was measured.

    Raises:
        CalibrationError: If the tokenizer has no chat template for conversations, or it does not take one.
        ConfigError: If a setting is out of range, or the window is longer than the model's context.
        DataError: If the text is too short for one window; the model is not a causal language model, does not belong to
            the tokenizer, or gives likelihoods that are not finite; or there is no BOS token where one is required.

    Example:
        >>> texts = load_texts("Salesforce/wikitext:wikitext-2-raw-v1", "test")  # doctest: +SKIP
        >>> print(evaluate_perplexity(model, tokenizer, texts, window=512, limit=40))  # doctest: +SKIP
        perplexity 22.35 ± 0.93 (n = 40 windows of 512 tokens, data 6b86b273ff34fce1)
    """
    warn_regrown(model, "what is scored is not the model that save_pretrained() writes, in which they are zero")
    if is_encoder_decoder(model):
        raise DataError(f"{type(model).__name__} has an encoder: {CAUSAL}")
    if bos_in_every_window is None:
        bos_in_every_window = starts_with_bos(tokenizer)
    lead = _bos(tokenizer, bos_in_every_window)
    window, stride = _window(model, window, stride, len(lead))
    check_positive("batch_size", batch_size)
    if limit is not None:
        check_positive("limit", limit)
    start = time.perf_counter()
    tokens = joined_tokens(texts, tokenizer)
    if len(lead) and len(tokens) and tokens[0] == lead[0]:
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
    error = standard_error_of(nlls, counts)
    perplexity = exp_or_inf(mean)
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
    check_confidence(confidence)
    _check_paired(dense, pruned)
    weights = dense.window_tokens
    differences = [b - a for a, b in zip(dense.window_nll, pruned.window_nll, strict=True)]
    log_ratio = math.fsum(d * w for d, w in zip(differences, weights, strict=True)) / sum(weights)
    error = standard_error_of(differences, weights)
    ratio, interval = exp_or_inf(log_ratio), None
    if error is not None:
        half = student_t(confidence, dense.n - 1) * error
        interval = exp_or_inf(log_ratio - half), exp_or_inf(log_ratio + half)
    return PerplexityComparison(
        dense_perplexity=dense.perplexity,
        pruned_perplexity=pruned.perplexity,
        ratio=ratio,
        ratio_standard_error=None if error is None else ratio * error,
        interval=interval,
        n=dense.n,
        confidence=confidence,
    )


def _bos(tokenizer: PreTrainedTokenizerBase, wanted: bool) -> Tensor:
    """(1,) with the BOS token, or (0,) if none is wanted."""
    if not wanted:
        return torch.tensor([], dtype=torch.int64)
    if tokenizer.bos_token_id is None:
        raise DataError(
            f"bos_in_every_window is set, but {type(tokenizer).__name__} has no BOS token: leave it out, or set "
            f"tokenizer.bos_token"
        )
    return torch.tensor([tokenizer.bos_token_id])


def _window(model: PreTrainedModel, window: int | None, stride: int | None, lead: int) -> tuple[int, int]:
    """Window and stride, checked, with their defaults filled in."""
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
    progress: bool | str | None,
) -> list[float]:
    """Mean negative log-likelihood of the last ``count`` tokens of each window."""
    title = progress if isinstance(progress, str) else "Scoring"
    starts = range(0, len(rows), batch_size)
    means: list[Tensor] = []
    with eval_mode(model), torch.inference_mode():
        check_causal(model, torch.cat([lead, rows[0]]))
        for start in Bar(starts, desc=title, progress=progress):
            part = rows[start : start + batch_size]
            ids = torch.cat([lead.expand(len(part), -1), part], 1)  # (batch, window)
            for row, logits, count in zip(
                ids, token_logits(model, ids), counts[start : start + batch_size], strict=True
            ):
                means.append(mean_nll(logits[-count - 1 : -1], row[-count:]))
    nlls: list[float] = torch.stack(means).tolist()
    if bad := sum(not math.isfinite(nll) for nll in nlls):
        raise DataError(
            f"{type(model).__name__} gives likelihoods that are not finite in {bad} of {len(nlls)} windows: its "
            f"weights are damaged, or its dtype overflows (load it in float32 or bfloat16)"
        )
    return nlls


def _check_paired(dense: Perplexity, pruned: Perplexity) -> None:
    for name in ("window", "stride", "bos_in_every_window", "n"):
        if (a := getattr(dense, name)) != (b := getattr(pruned, name)):
            raise DataError(f"the results have different windows ({name} {a} and {b}): evaluate both in the same way")
    if dense.data_fingerprint != pruned.data_fingerprint:
        raise DataError(
            f"the results are on different tokens (fingerprints {dense.data_fingerprint} and "
            f"{pruned.data_fingerprint}): evaluate both models on the same texts with the same tokenizer"
        )
