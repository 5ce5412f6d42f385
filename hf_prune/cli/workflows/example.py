"""An input with the output that a pipeline gives for it, for a model card."""

from __future__ import annotations

import pprint
from typing import Any

from hf_prune.checkpoint.sources import model_class
from hf_prune.errors import DataError
from hf_prune.hub.card_words import task_of

_TAKE_TEXTS = ("text-classification", "token-classification", "fill-mask", "text-generation")
_TOKENS = 24  # that a language model continues a text by


def example_of(folder: str, text: str) -> dict[str, str]:
    """Run the pipeline of a checkpoint on a text.

    Args:
        folder: The checkpoint, with its tokenizer.
        text: The input.

    Returns:
        The ``"input"``, and the ``"output"`` as Python prints it.

    Raises:
        DataError: If the task of the model has no pipeline that takes a text.
    """
    from transformers import GenerationConfig, pipeline

    name = model_class(folder)
    kind: Any = (task_of(name) or ("",))[0]
    if kind not in _TAKE_TEXTS:
        raise DataError(f"{folder} is a {name}, whose pipeline takes no text alone: leave --example out")
    options: dict[str, Any] = {}
    if kind == "text-generation":
        options["generation_config"] = GenerationConfig(max_new_tokens=_TOKENS, do_sample=False)
    output = pipeline(kind, model=folder, device="cpu")(text, **options)
    return {"input": text, "output": pprint.pformat(_rounded(output), width=100, compact=True)}


def _rounded(value: object) -> object:
    """The same output with four digits of each number."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return {key: _rounded(item) for key, item in value.items()} if isinstance(value, dict) else value
