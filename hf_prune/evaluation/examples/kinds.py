"""The kinds of tasks that are scored example by example, and which of them a model is for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_prune.errors import ConfigError

if TYPE_CHECKING:
    from hf_prune.evaluation.examples.base import ExampleKind

_PLACES = {  # module and class of each kind, imported when they are used
    "classification": ("sequences", "Classification"),
    "multi-label-classification": ("sequences", "MultiLabel"),
    "regression": ("sequences", "Regression"),
    "token-classification": ("tokens", "TokenClassification"),
    "question-answering": ("questions", "QuestionAnswering"),
    "image-classification": ("images", "ImageClassification"),
    "text-generation": ("generation", "TextGeneration"),
    "language-modeling": ("language", "LanguageModeling"),
}
KINDS = tuple(_PLACES)


def find_kind(name: str) -> ExampleKind:
    """The kind with a name.

    Raises:
        ConfigError: If there is none.
    """
    if name not in _PLACES:
        raise ConfigError(f"the kind of task is {name!r}: expected one of {', '.join(KINDS)}")
    module, cls = _PLACES[name]
    found: ExampleKind = getattr(importlib.import_module(f"hf_prune.evaluation.examples.{module}"), cls)()
    return found


def kind_of_model(class_name: str, config: Mapping[str, Any]) -> str | None:
    """The kind of task that a model is for; None if it is none of these.

    Args:
        class_name: The name of its class, such as ``"BertForTokenClassification"``.
        config: The values of its config.
    """
    if class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return "language-modeling"
    if class_name.endswith("ForSequenceClassification"):
        problem = config.get("problem_type")
        labels = len(config.get("id2label") or {0: "", 1: ""})  # transformers leaves out what is two
        if problem == "regression" or labels == 1:
            return "regression"
        return "multi-label-classification" if problem == "multi_label_classification" else "classification"
    endings = {
        "ForTokenClassification": "token-classification",
        "ForQuestionAnswering": "question-answering",
        "ForImageClassification": "image-classification",
        "ForConditionalGeneration": "text-generation",
        "MTModel": "text-generation",
        "MarianMTModel": "text-generation",
    }
    kind = next((kind for ending, kind in endings.items() if class_name.endswith(ending)), None)
    return kind if kind != "text-generation" or _reads_texts_and_writes(config) else None


def _reads_texts_and_writes(config: Mapping[str, Any]) -> bool:
    media = ("vision_config", "audio_config", "num_mel_bins", "speech_encoder")
    return not any(name in config for name in media)
