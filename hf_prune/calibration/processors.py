"""What turns raw data into inputs of a model: its tokenizer, image processor or feature extractor.

Each is looked for where the model was loaded from: in the folder, or in the same commit of the Hub's repository. No
code of a checkpoint is run.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from hf_prune.errors import CalibrationError

_TOKENIZERS = ("AutoTokenizer",)
_PROCESSORS = ("AutoImageProcessor", "AutoFeatureExtractor")
# What transformers raises where there is no such thing, or what it needs is not installed.
_NOT_THERE = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError)


def forward_names(model: nn.Module) -> frozenset[str]:
    """The names of a model's inputs."""
    return frozenset(inspect.signature(model.forward).parameters)


def find_tokenizer(model: nn.Module, given: Any = None) -> Any:
    """The tokenizer of a model, with a padding token: what was given, or what lies beside the model.

    Args:
        model: The model.
        given: A tokenizer, or a processor that has one.

    Raises:
        CalibrationError: If there is none.
    """
    tokenizer = getattr(given, "tokenizer", given) if given is not None else _beside(model, _TOKENIZERS)
    if tokenizer is None or (given is None and len(tokenizer) <= len(tokenizer.all_special_tokens)):  # made up
        raise CalibrationError(f"found texts, and no tokenizer {_place(model)}: pass tokenizer=, or batches")
    if not callable(tokenizer) or not hasattr(tokenizer, "model_max_length"):
        raise CalibrationError(f"tokenizer is a {type(tokenizer).__name__}: expected a tokenizer of transformers")
    return tokenizer


def find_processor(model: nn.Module, what: str, given: Any = None) -> Any:
    """The image processor or feature extractor of a model: what was given, or what lies beside the model.

    Args:
        model: The model.
        what: ``"images"`` or ``"sounds"``, for messages.
        given: A processor, or one that holds it.

    Raises:
        CalibrationError: If there is none.
    """
    if given is None:
        given = _beside(model, _PROCESSORS if what == "images" else _PROCESSORS[1:])
    for name in ("image_processor",) if what == "images" else ("feature_extractor",):
        given = getattr(given, name, given)
    if given is None or not callable(given):
        raise CalibrationError(
            f"found {what}, and no processor {_place(model)}: pass tokenizer=AutoProcessor.from_pretrained(...), or "
            f"batches as a processor makes them"
        )
    return given


def _beside(model: nn.Module, classes: tuple[str, ...]) -> Any:
    import transformers

    config = getattr(model, "config", None)
    name, commit = getattr(config, "_name_or_path", ""), getattr(config, "_commit_hash", None)
    revision = {} if commit is None else {"revision": commit}
    for cls in classes if name else ():
        try:
            return getattr(transformers, cls).from_pretrained(name, **revision, trust_remote_code=False)
        except _NOT_THERE:
            continue
    return None


def _place(model: nn.Module) -> str:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"beside the model in {name!r}" if name else f"beside the {type(model).__name__}, which comes from no folder"
