"""Whether the weights of a model are plain numbers, or in another number format that only looks like them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_prune.errors import PlanError
from hf_prune.utils.quantization_method import METHOD
from hf_prune.utils.wrapping import check_is_model

EXPECTED = "expected float32, float64, float16 or bfloat16; prune before quantizing"
# What modules of GPTQ, AWQ, HQQ, compressed-tensors and torch.ao have in place of a weight.
_PACKED = ("qweight", "W_q", "weight_packed", "_packed_params")


def refuse_quantized(model: nn.Module) -> None:
    """Make sure that the weights of a model are plain floating-point numbers.

    Raises:
        ModelTypeError: If it is no model.
        PlanError: If the model or one inside it is quantized, or a weight is in a format of another kind.
    """
    check_is_model(model)
    for prefix, module in model.named_modules():
        name = prefix or type(model).__name__
        if (method := _method_of_model(module)) is not None:
            raise PlanError(f"{name} ({type(module).__name__}) is quantized with {method!r}: {EXPECTED}")
        held = {**module._parameters, **module._buffers, **module._modules}
        if packed := [key for key in _PACKED if held.get(key) is not None]:
            raise PlanError(f"{name} is a {type(module).__name__}, which has {packed[0]} for a weight: {EXPECTED}")
        weights = {key: tensor for key, tensor in module._parameters.items() if tensor is not None}
        if isinstance(buffer := module._buffers.get("weight"), Tensor):
            weights["weight"] = buffer
        for key, tensor in weights.items():
            name = f"{prefix}.{key}".removeprefix(".")
            if tensor.layout != torch.strided:
                raise PlanError(f"{name} is stored as {tensor.layout}: expected a dense tensor; call to_dense() on it")
            if (found := _foreign(tensor, multiplies=key == "weight")) is not None:
                raise PlanError(f"{name} is {found}: {EXPECTED}")


def method_of_config(config: Any) -> str | None:
    """How the weights of a checkpoint are quantized, by its config; None if they are not, or packed by us."""
    described = [getattr(config, "quantization_config", None)]
    described += [getattr(getattr(config, key, None), "quantization_config", None) for key in _sub_configs(config)]
    return next((method for each in described if (method := _method(each)) is not None), None)


def _sub_configs(config: Any) -> list[str]:
    return list(getattr(config, "sub_configs", None) or {})


def _method(described: Any) -> str | None:
    if described is None:
        return None
    method = described.get("quant_method") if isinstance(described, Mapping) else described.quant_method
    method = str(getattr(method, "value", method) or "an unnamed method")
    return None if method == METHOD else method


def _method_of_model(module: nn.Module) -> str | None:
    found = _method(getattr(getattr(module, "hf_quantizer", None), "quantization_config", None))
    found = found or method_of_config(getattr(module, "config", None))
    if found is None and getattr(module, "is_quantized", False) is True:
        method = str(getattr(module, "quantization_method", None) or "an unnamed method")
        found = None if method == METHOD else method
    return found


def _foreign(weight: Tensor, multiplies: bool) -> str | None:
    """What a weight is if it is no plain one; whole numbers and truth values are, where nothing multiplies by them."""
    for kind in type(weight).__mro__:
        if kind in (Tensor, nn.Parameter, DTensor):
            break
        if "__torch_dispatch__" in vars(kind) or "__torch_function__" in vars(kind):
            return f"a {type(weight).__name__}, which says {weight.dtype}"
    if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):  # of bitsandbytes, in any type
        return f"a {type(weight).__name__} of {weight.dtype}"
    narrow = weight.dtype != torch.bool and weight.element_size() == 1
    if weight.dim() > 1 and (narrow or (multiplies and not weight.is_floating_point())):
        return str(weight.dtype)
    return None
