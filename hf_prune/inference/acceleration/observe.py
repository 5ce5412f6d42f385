"""What a model does on its inputs: which layers it calls, on how many tokens, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.inference.acceleration.kernels import DTYPES
from hf_prune.inference.acceleration.layers import CLASSES
from hf_prune.inference.subnormals import has_subnormals
from hf_prune.utils.forward import tensors_in


@dataclass
class Seen:
    """One run of the model.

    Args:
        layers: The layers that it called and that can be accelerated, by name.
        tokens: The numbers of tokens that they got.
        outputs: What the model returned.
        subnormal: Names of layers whose inputs hold subnormal numbers.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    tokens: set[int] = field(default_factory=set)
    outputs: list[Tensor] = field(default_factory=list)
    subnormal: list[str] = field(default_factory=list)


def observe(model: nn.Module, inputs: Mapping[str, Any]) -> Seen:
    """Run the model and see which layers it calls: weights that it reads without a call must stay where they are."""
    seen = Seen()

    def note(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is None:
                return
            seen.layers[name] = module
            seen.tokens.add(x.numel() // max(1, x.shape[-1]))
            if has_subnormals(x):
                seen.subnormal.append(name)

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if _suits(module):
                hooks.callback(module.register_forward_pre_hook(note(name, module), with_kwargs=True).remove)
        seen.outputs = [tensor.clone() for tensor in _answer(model, inputs)]
    return seen


def _suits(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    plain = type(module) in CLASSES and "forward" not in module.__dict__ and type(weight) is nn.Parameter
    return plain and weight is not None and weight.numel() > 0 and weight.dtype in DTYPES.values()


def _answer(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The floating-point tensors that a model returns, in order."""
    with torch.inference_mode():
        return [tensor for tensor in tensors_in(model(**inputs)) if tensor.is_floating_point()]


def matrix_of(module: nn.Module) -> Tensor:
    """(out, in) of a layer's weight."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().t()


def bias_of(module: nn.Module) -> Tensor | None:
    """(out,) of a layer's bias, if it has one."""
    bias = module._parameters.get("bias")
    return None if bias is None else bias.detach()


def difference_to(before: Sequence[Tensor], model: nn.Module, inputs: Mapping[str, Any]) -> float:
    """The largest change of an output, as a share of the largest one in the same tensor; NaN where one became NaN."""
    shares = [0.0]
    for new, old in zip(_answer(model, inputs), before, strict=True):
        if old.numel():
            shares.append(share_of_largest(old, new))
    return math.nan if any(map(math.isnan, shares)) else max(shares)


def share_of_largest(old: Tensor, new: Tensor) -> float:
    """The largest change of a tensor, as a share of its largest number; NaN where a number became NaN."""
    change = torch.where(new == old, 0, (new - old).abs())  # infinities that stay are no change
    finite = old.abs()[old.isfinite()]
    largest = float(finite.max()) if finite.numel() else 0.0
    return float(torch.where(new.isnan() & old.isnan(), 0, change).max()) / max(largest, 1e-30)
