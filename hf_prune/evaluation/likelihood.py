"""The likelihood that a causal language model gives to tokens, and whether it predicts them without looking ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_prune.calibration.accumulators import accumulate_dtype
from hf_prune.errors import DataError
from hf_prune.utils.forward import batch_to_device, no_cache, run_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHUNK = 1 << 23  # logits that are converted to float32 at a time
_PROBE = 8  # tokens by which a model that looks ahead is recognised
CAUSAL = (
    "perplexity is that of a causal language model, with logits (batch, seq, vocab); load one with AutoModelForCausalLM"
)


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer starts every text with its BOS token, as the texts started that its model was trained on."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def mean_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood, computed a few positions at a time to save memory.

    Args:
        logits: (seq, vocab).
        targets: (seq,).
    """
    step = max(1, _CHUNK // logits.shape[1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    total = torch.zeros((), dtype=accumulate_dtype(logits.device), device=logits.device)
    for part, target in zip(logits.split(step), targets.to(logits.device).split(step), strict=True):
        total += torch.nn.functional.cross_entropy(part.to(dtype), target, reduction="none").to(total.dtype).sum()
    return total / len(targets)


def token_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits of a batch: (batch, seq, vocab).

    Args:
        model: The model.
        ids: (batch, seq).

    Raises:
        DataError: If there are none.
    """
    batch = {**batch_to_device(model, {"input_ids": ids}), **no_cache(model)}
    logits = getattr(run_model(model, batch, DataError), "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape or logits.shape[-1] <= int(ids.max()):
        returned = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no logits"
        raise DataError(f"{type(model).__name__} returns {returned} for {tuple(ids.shape)} tokens: {CAUSAL}")
    return logits


def check_causal(model: PreTrainedModel, tokens: Tensor) -> None:
    """Make sure that a model predicts tokens without looking ahead.

    Args:
        model: The model, in eval mode.
        tokens: (seq,), of which the first few are used.

    Raises:
        DataError: If it has no logits, or changing the last token changes those before it.
    """
    tokens = tokens[:_PROBE]
    changed = tokens.clone()
    changed[-1] = 0 if tokens[-1] else 1
    one, other = token_logits(model, torch.stack([tokens, changed]))[:, :-1].float()
    tolerance = max(1e-4, 4 * torch.finfo(next(model.parameters()).dtype).eps)
    if (one - other).abs().max() > tolerance * one.abs().max():
        raise DataError(f"{type(model).__name__} sees the tokens that it has to predict: {CAUSAL}")
