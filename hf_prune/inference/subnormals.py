"""Subnormal numbers among activations: smaller than a float's smallest normal number, and many times slower on CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


def has_subnormals(x: Tensor) -> bool:
    """Whether a floating-point tensor holds numbers that are not zero and below the smallest normal one.

    Those of float16 do not count: processors compute with them in float32, where they are normal.
    """
    smallest = min(torch.finfo(x.dtype).tiny, torch.finfo(torch.float32).tiny)
    return bool(((x != 0) & (x.abs() < smallest)).any())


def subnormal_note(layer: str) -> str:
    """What to say of a layer whose inputs hold them."""
    return (
        f"Inputs of {layer} hold subnormal numbers, on which processors are many times slower: "
        f"torch.set_flush_denormal(True) turns them into zeros."
    )


def subnormal_layer(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """The first layer with a weight matrix whose inputs hold subnormal numbers; None if there is none.

    Args:
        model: Any model.
        inputs: Keyword arguments of its forward pass.
    """
    found: list[str] = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = (*args, *kwargs.values())
            if not found and any(isinstance(x, Tensor) and x.is_floating_point() and has_subnormals(x) for x in values):
                found.append(name)

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() >= 2:
                hooks.callback(module.register_forward_pre_hook(note(name), with_kwargs=True).remove)
        model(**inputs)
    return found[0] if found else None
