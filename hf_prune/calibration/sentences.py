"""Texts as calibration batches for models of sentence-transformers, as the model itself reads them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_prune.errors import ConfigError, DataError
from hf_prune.planning.checks import check_positive

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

_log = logging.getLogger(__name__)
_BOOKKEEPING = ("prompt_length", "task")  # keys of features that are not inputs of the transformers model


def sentence_batches(
    texts: Iterable[str] | Iterable[Sequence[str]],
    model: BaseModel,
    *,
    prompt_name: str | None = None,
    batch_size: int = 32,
    max_length: int = 128,
) -> list[dict[str, Tensor]]:
    """Texts, or pairs of texts for a ``CrossEncoder``, as batches of a model of sentence-transformers.

    The model tokenizes them itself, with its prompts. ``prune`` takes texts in place of batches and then does this.

    Args:
        texts: Texts, or pairs of texts.
        model: A ``SentenceTransformer``, ``CrossEncoder`` or another model of that library.
        prompt_name: Which of ``model.prompts`` stands before the texts; None for the model's default.
        batch_size: Texts per batch; the last batch may be smaller.
        max_length: Longer texts are cut to this many tokens, or to what the model allows if that is less.
            Blank texts are left out.

    Returns:
        Batches on the CPU with the inputs of the transformers model: ``input_ids`` and ``attention_mask`` (batch, seq),
        int64, and what else its tokenizer makes. Short texts come first, so that little of a batch is padding.

    Raises:
        ConfigError: If ``batch_size`` or ``max_length`` is below 1, or the model has no such prompt.
        DataError: If there are no texts, all are blank, or one is neither a text nor a pair of texts.

    Example:
        >>> batches = sentence_batches(questions, model, prompt_name="query")  # doctest: +SKIP
        >>> batches += sentence_batches(passages, model, prompt_name="document")  # doctest: +SKIP
        >>> hf_prune.prune(model, 0.5, criterion="wanda", calibration=batches)  # doctest: +SKIP
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        check_positive(name, value)
    prompt = _prompt(model, prompt_name)
    checked = [_checked(i, text) for i, text in enumerate([] if isinstance(texts, str) else texts)]
    if not checked:
        raise DataError(f"texts is {texts!r}: expected a list of texts, or of pairs of texts, at least one")
    if len({type(text) for text in checked}) > 1:
        raise DataError("found texts and pairs of texts: expected only texts, or only pairs of two")
    if not (filled := [text for text in checked if "".join(text).strip()]):
        raise DataError(f"all {len(checked):,} texts are blank: expected at least one with words")
    if len(filled) < len(checked):
        _log.info("%d of %d texts are blank, and are left out.", len(checked) - len(filled), len(checked))
    checked = filled
    checked.sort(key=lambda text: len(text) if isinstance(text, str) else sum(map(len, text)))
    limit = min(max_length, model.max_seq_length or max_length)

    def encode(part: Sequence[Any]) -> dict[str, Tensor]:
        features = model.preprocess(part, prompt=prompt, processing_kwargs={"text": {"max_length": limit}})
        return inputs_of_model(features)

    return [encode(checked[start : start + batch_size]) for start in range(0, len(checked), batch_size)]


def inputs_of_model(features: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs of the transformers model among the features of a model of sentence-transformers."""
    return {name: x for name, x in features.items() if isinstance(x, Tensor) and name not in _BOOKKEEPING}


def _prompt(model: Any, name: str | None) -> str | None:
    if name is None:
        name = model.default_prompt_name
    elif name not in model.prompts:
        known = ", ".join(map(repr, model.prompts)) or "none"
        raise ConfigError(f"prompt_name is {name!r}: {type(model).__name__} has the prompts {known}")
    prompt: str | None = None if name is None else model.prompts[name]
    return prompt


def _checked(number: int, text: object) -> str | tuple[str, ...]:
    if isinstance(text, str):
        return text
    if isinstance(text, Sequence) and len(text) == 2 and all(isinstance(part, str) for part in text):
        return tuple(text)
    raise DataError(f"text {number} is {text!r:.80}: expected a text, or two for a pair")
