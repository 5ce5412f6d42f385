"""Whether the weights of a model are plain floating-point numbers, or quantized in any way."""

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
# Attributes of GPTQ, AWQ, HQQ, compressed-tensors and torch.ao modules that replace a weight.
_PACKED = ("qweight", "W_q", "weight_packed", "_packed_params")


def refuse_quantized(model: nn.Module) -> None:
    """Make sure that the weights of a model are plain floating-point numbers.

    Raises:
        ModelTypeError: If it is not a model.
        PlanError: If the model or a part of it is quantized, or a weight has another number format.
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
            if (kind := _foreign_format(tensor, is_factor=key == "weight")) is not None:
                raise PlanError(f"{name} is {kind}: {EXPECTED}")


def method_of_config(config: Any) -> str | None:
    """The quantization method in a checkpoint's config; None if there is none, or if it is our packed format."""
    described = [getattr(config, "quantization_config", None)]
    described += [getattr(getattr(config, key, None), "quantization_config", None) for key in _sub_configs(config)]
    return next((method for settings in described if (method := _method(settings)) is not None), None)


def _sub_configs(config: Any) -> list[str]:
    return list(getattr(config, "sub_configs", None) or {})


def _method(described: Any) -> str | None:
    if described is None:
        return None
    method = described.get("quant_method") if isinstance(described, Mapping) else described.quant_method
    method = str(getattr(method, "value", method) or "an unnamed method")
    return None if method == METHOD else method


def _method_of_model(module: nn.Module) -> str | None:
    method = _method(getattr(getattr(module, "hf_quantizer", None), "quantization_config", None))
    method = method or method_of_config(getattr(module, "config", None))
    if method is None and getattr(module, "is_quantized", False) is True:
        named = str(getattr(module, "quantization_method", None) or "an unnamed method")
        method = None if named == METHOD else named
    return method


def is_wrapped(weight: Tensor) -> bool:
    """Whether a weight is of a tensor class of its own, such as those of quanto and torchao for other numbers."""
    for kind in type(weight).__mro__:
        if kind in (Tensor, nn.Parameter, DTensor):
            break
        if "__torch_dispatch__" in vars(kind) or "__torch_function__" in vars(kind):
            return True
    return False


def plain_values(weight: Tensor) -> Tensor:
    """The numbers that a weight stands for."""
    return weight.dequantize() if is_wrapped(weight) else weight


def _foreign_format(weight: Tensor, is_factor: bool) -> str | None:
    """The format of a weight that is not plain; integers and booleans are plain if nothing is multiplied by them."""
    if is_wrapped(weight):
        return f"a {type(weight).__name__}, which says {weight.dtype}"
    if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):  # bitsandbytes, in any dtype
        return f"a {type(weight).__name__} of {weight.dtype}"
    narrow = weight.dtype != torch.bool and weight.element_size() == 1
    if weight.dim() > 1 and (narrow or (is_factor and not weight.is_floating_point())):
        return str(weight.dtype)
    return None
