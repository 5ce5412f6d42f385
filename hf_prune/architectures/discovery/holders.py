"""Of which class a small model is built to try things out on."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_prune.architectures.modules import base_prefix


def model_holders(model: Any) -> list[Any]:
    """The models of which a small one is tried: the base model, which needs no head's inputs, or else the whole.

    Args:
        model: A transformers model.
    """
    from transformers import PreTrainedModel

    base = model.base_model
    is_base = base is not model and isinstance(base, PreTrainedModel) and not base_prefix(base)
    return [base, model] if is_base else [model]


def native_class(model: nn.Module) -> Any:
    """The class of transformers that a model is of; ours only adds methods for masks."""
    return next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("hf_prune."))
