"""Turn texts into calibration batches: padded one by one, or joined and cut into windows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.conversations import conversation_tokens, is_conversation
from hf_prune.errors import DataError
from hf_prune.planning.checks import check_positive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


def text_batches(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 32, max_length: int = 128
) -> list[dict[str, Tensor]]:
    """Unlabelled texts as padded batches, for criteria and repairs that learn from the inputs of each layer.

    A decoder beside an encoder (T5, BART, Marian) reads the encoder's text unless a batch has ``labels`` or
    ``decoder_input_ids``. Where its target differs, as in translation, pass the targets as ``labels``:
    ``tokenizer(texts, text_target=translations, padding=True, return_tensors="pt")`` is such a batch.

    Args:
        texts: A list of texts, or a column of a data set.
        tokenizer: A tokenizer with a padding token.
        batch_size: Texts per batch; the last batch may be smaller.
        max_length: Longer texts are cut to this many tokens, or to what the tokenizer allows if that is less.
            Blank texts, such as the blank lines of WikiText, are left out.

    Returns:
        Batches on the CPU with what the tokenizer makes: ``input_ids`` and ``attention_mask`` (batch, seq), int64.
        Short texts come first, so that texts of about the same length share a batch and little of it is padding.

    Raises:
        ConfigError: If ``batch_size`` or ``max_length`` is below 1.
        DataError: If there are no texts, all are blank, one is not a string, or the tokenizer has no padding token.

    Example:
        >>> batches = text_batches(["a good film", "a bad one"], tokenizer)  # doctest: +SKIP
        >>> hf_prune.prune(model, 0.5, criterion="sparsegpt", calibration=batches)  # doctest: +SKIP
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        check_positive(name, value)
    checked = _checked_texts(texts)
    if tokenizer.pad_token is None:
        raise DataError(
            "the tokenizer has no padding token: set one, for instance tokenizer.pad_token = tokenizer.eos_token"
        )
    length = min(max_length, tokenizer.model_max_length)
    return [batch for batch, _ in padded_texts(checked, tokenizer, batch_size=batch_size, max_length=length)]


def padded_texts(
    texts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, *, batch_size: int, max_length: int
) -> Iterator[tuple[dict[str, Tensor], list[int]]]:
    """Texts, or pairs of texts, as padded batches, the short ones first; those that are blank are left out.

    Args:
        texts: Texts, or tuples of two.
        tokenizer: A tokenizer with a padding token.
        batch_size: Texts per batch; the last batch may be smaller.
        max_length: Longer texts are cut to this many tokens.

    Yields:
        A batch, and which of the texts it holds.

    Raises:
        DataError: If all are blank.
    """

    def size(row: int) -> int:
        text = texts[row]
        return len(text) if isinstance(text, str) else sum(map(len, text))

    order = sorted((row for row, text in enumerate(texts) if "".join(text).strip()), key=size)
    if not order:
        raise DataError(f"all {len(texts):,} texts are blank: expected at least one with words")
    if len(order) < len(texts):
        _log.info("%d of %d texts are blank, and are left out.", len(texts) - len(order), len(texts))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        part = [texts[row] for row in rows]
        sides = [part] if isinstance(part[0], str) else [list(side) for side in zip(*part, strict=True)]
        encoded = tokenizer(*sides, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        yield dict(encoded), rows


def context_length(model: nn.Module) -> int | None:
    """How many tokens the model has positions for; None if it does not say."""
    config: Any = getattr(model, "config", None)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    if not isinstance(positions, int) or positions < 1:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return positions - module.padding_idx - 1  # RoBERTa and its kin count from after the padding
    return positions


def token_windows(
    texts: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int = 128,
    length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    labels: bool = False,
) -> list[dict[str, Tensor]]:
    """Full windows of joined text as batches, to calibrate causal language models without padding.

    The texts become one row of tokens (see :func:`joined_tokens`), which is cut into consecutive windows; some are
    drawn at random. SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774) and its followers calibrate on 128 windows
    of 2048 tokens.

    Args:
        texts: A list of texts, or a column of a data set; or conversations, which the chat template writes out.
        tokenizer: The model's tokenizer.
        n: How many windows, drawn without replacement; all if there are fewer.
        length: Tokens of a window; what the tokenizer allows if that is less.
        batch_size: Windows per batch; the last batch may be smaller.
        seed: The same seed draws the same windows in the same order.
        labels: Also give ``labels``, the tokens themselves, for criteria that need gradients.

    Returns:
        Batches on the CPU: ``input_ids`` and ``attention_mask`` (batch, length), int64, the latter all 1.

    Raises:
        CalibrationError: If there is no chat template for conversations, or it does not take one.
        ConfigError: If ``n``, ``length`` or ``batch_size`` is below 1.
        DataError: If there are no texts, one is not a string, or they are too short for one window.

    Example:
        >>> batches = token_windows(load_texts("wiki.train.raw"), tokenizer, n=64)  # doctest: +SKIP
        >>> hf_prune.prune(model, 0.5, criterion="sparsegpt", calibration=batches)  # doctest: +SKIP
    """
    for name, value in (("n", n), ("length", length), ("batch_size", batch_size)):
        check_positive(name, value)
    length = min(length, tokenizer.model_max_length)
    tokens = joined_tokens(texts, tokenizer)
    count = len(tokens) // length
    if count == 0:
        raise DataError(
            f"the texts have {len(tokens):,} tokens: expected at least the {length:,} of one window; pass more text, "
            f"or a smaller length"
        )
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:n]
    windows = tokens[: count * length].view(count, length)[drawn]
    batches = []
    for ids in windows.split(batch_size):
        batch = {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids)}
        batches.append({**batch, "labels": ids.clone()} if labels else batch)
    return batches


def joined_tokens(texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    r"""Texts as one row of tokens, as for published perplexities on WikiText-2.

    The texts are joined by ``"\n\n"`` and tokenized once, so a beginning-of-sequence token occurs only at the start.
    Conversations are written out by the chat template, which has the special tokens, and follow one another.

    Args:
        texts: A list of texts, or a column of a data set; or conversations, lists of messages with ``role`` and
            ``content``.
        tokenizer: Any tokenizer; for conversations, one with a chat template.

    Returns:
        (tokens,) int64, on the CPU.

    Raises:
        CalibrationError: If the tokenizer has no chat template for conversations, or it does not take one.
        DataError: If there are no texts, or one is not a string.
    """
    given = [] if isinstance(texts, str) else list(texts)
    if given and is_conversation(given[0]):
        tokens = [token for row in conversation_tokens(given, tokenizer) for token in row]
    else:
        joined = "\n\n".join(_checked_texts(given or texts))
        tokens = tokenizer(joined, truncation=False, verbose=False)["input_ids"]
    return torch.tensor(tokens, dtype=torch.int64)


def _checked_texts(texts: Iterable[str]) -> list[str]:
    checked = [] if isinstance(texts, str) else list(texts)
    if not checked:
        raise DataError(f"texts is {texts!r}: expected a list of texts, at least one")
    for i, text in enumerate(checked):
        if not isinstance(text, str):
            raise DataError(f"text {i} is {text!r}: expected a string")
    return checked
