"""How a model is run on a batch: in eval mode, where its weights are, and computing no more than is looked at."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.errors import CalibrationError


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's own flag back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def on_device(model: nn.Module, batch: object) -> dict[str, Any]:
    """A batch as keyword arguments, on the model's device.

    Raises:
        CalibrationError: If it is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise CalibrationError(f"a calibration batch is a {type(batch).__name__}: expected a dict of model inputs")
    device = device_of(model)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes; weights that are not loaded lie on no device."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def no_cache(model: nn.Module) -> dict[str, Any]:
    """Arguments with which a language model keeps nothing for tokens that are not to come."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def no_logits(model: nn.Module, targets: set[str]) -> dict[str, Any]:
    """Arguments with which a language model computes few logits, unless what computes them is a target."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if "logits_to_keep" not in inspect.signature(model.forward).parameters or head is None:
        return {}
    names = {name for name, parameter in model.named_parameters() if any(parameter is p for p in head.parameters())}
    return {} if names & targets else {"logits_to_keep": 1}
