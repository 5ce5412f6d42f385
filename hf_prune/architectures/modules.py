"""Look up the modules that an entry of the table names, and describe the units in their weights as slices."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_prune.architectures.unit_groups import UnitSlice, plain_weights
from hf_prune.errors import ArchitectureError


def model_type_of(model: nn.Module) -> str:
    """``model.config.model_type``, or an empty string."""
    return getattr(getattr(model, "config", None), "model_type", "") or ""


def base_prefix(model: nn.Module) -> str:
    """What comes before the names of modules of the base model, such as ``"bert."``."""
    base = getattr(model, "base_model", model)
    return "" if base is model else f"{model.base_model_prefix}."


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """The module with a name, or None."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def find_tensor(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer with a name, or None."""
    holder, _, key = name.rpartition(".")
    if (module := find_module(model, holder)) is None:
        return None
    parameter = module._parameters.get(key)
    return module._buffers.get(key) if parameter is None else parameter


def is_saved(model: nn.Module, name: str) -> bool:
    """Whether a tensor is part of checkpoints; buffers that are not are computed anew when a model is loaded."""
    holder, _, key = name.rpartition(".")
    return key not in model.get_submodule(holder)._non_persistent_buffers_set


def attribute_holder(model: nn.Module, module: str, attribute: str) -> tuple[Any, str]:
    """What an attribute of a module belongs to, such as its config for ``"config.num_heads"``, and its name there."""
    owner: Any = model.get_submodule(module)
    *path, key = attribute.split(".")
    for name in path:
        owner = getattr(owner, name)
    return owner, key


def attribute_value(owner: Any, key: str) -> Any:
    """What an attribute holds, or an entry of its list or tuple, as in ``"sizes[0]"``; None without it."""
    name, _, index = key.removesuffix("]").partition("[")
    value = getattr(owner, name, None)
    if not index:
        return value
    return value[int(index)] if isinstance(value, list | tuple) and int(index) < len(value) else None


def set_attribute_value(owner: Any, key: str, value: Any) -> None:
    """Set an attribute, or an entry of its list or tuple, in place of which comes a new one: others may share it."""
    name, _, index = key.removesuffix("]").partition("[")
    if index:
        entries = getattr(owner, name)
        value = type(entries)(value if number == int(index) else entry for number, entry in enumerate(entries))
    setattr(owner, name, value)


def expected_module(model: nn.Module, name: str) -> nn.Module:
    """The module with a name.

    Raises:
        ArchitectureError: If there is none.
    """
    module = find_module(model, name)
    if module is None:
        raise ArchitectureError(
            f"{type(model).__name__} has no module {name}, which the table of architectures expects: register the "
            f"architecture under another config.model_type"
        )
    return module


def output_count(model: nn.Module, name: str) -> int:
    """How many outputs a linear module has."""
    return _features(model, name)[0]


def input_count(model: nn.Module, name: str) -> int:
    """How many inputs a linear module has."""
    return _features(model, name)[1]


def output_slices(
    model: nn.Module, name: str, units: int, empty_width: int, projections: int = 1
) -> tuple[UnitSlice, ...]:
    """Slices of the weight and the bias of a linear module whose outputs are units of the same width.

    Args:
        model: The model.
        name: The module.
        units: How many units there are.
        empty_width: The width of a unit if none is left, when the weight no longer tells it.
        projections: How many projections the module computes, one after the other.

    Raises:
        ArchitectureError: If the outputs cannot be divided evenly.
    """
    total = output_count(model, name)
    _check_divides(model, name, total, units * projections)
    size = total // projections
    width = size // units if units else empty_width
    offsets = tuple(range(0, total, size)) if size else (0,) * projections
    module = expected_module(model, name)
    weight = UnitSlice(f"{name}.weight", output_and_input_dim(module)[0], width, offsets)
    if module._parameters.get("bias") is None:
        return (weight,)
    return weight, UnitSlice(f"{name}.bias", 0, width, offsets)


def input_slice(model: nn.Module, name: str, units: int, empty_width: int) -> UnitSlice:
    """The slice of the weight of a linear module whose inputs are units; arguments as :func:`output_slices`."""
    total = input_count(model, name)
    _check_divides(model, name, total, units)
    dim = output_and_input_dim(expected_module(model, name))[1]
    return UnitSlice(f"{name}.weight", dim, total // units if units else empty_width)


def _check_divides(model: nn.Module, name: str, total: int, units: int) -> None:
    if total and (not units or total % units):
        raise ArchitectureError(
            f"{name} of {type(model).__name__} has {total} features for {units} units: expected a multiple; its "
            f"entry in the table of architectures does not fit"
        )


def _features(model: nn.Module, name: str) -> tuple[int, int]:
    """How many outputs and inputs a linear module has."""
    module = expected_module(model, name)
    weight = plain_weights(name, module).get("weight")
    if weight is None:
        raise ArchitectureError(
            f"{name} of {type(model).__name__} is a {type(module).__name__} without a weight: expected a Linear, as in "
            f"the table of architectures; register the architecture under another config.model_type"
        )
    output_dim, input_dim = output_and_input_dim(module)
    return weight.shape[output_dim], weight.shape[input_dim]


def output_and_input_dim(module: nn.Module) -> tuple[int, int]:
    """The dimensions of a weight along which outputs and inputs lie."""
    from transformers.pytorch_utils import Conv1D

    return (1, 0) if isinstance(module, Conv1D) else (0, 1)
