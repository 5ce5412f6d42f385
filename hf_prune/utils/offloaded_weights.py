"""Weights kept elsewhere: the model holds placeholders on the meta device instead.

Either hooks of the library accelerate hold them (offloaded weights), or a layer that ``hf_prune.accelerate`` gave
another kernel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_prune.errors import PlanError


def values_of(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """Read the values of a parameter, wherever it is offloaded. The result must not be modified.

    Args:
        model: The model with the hooks of accelerate.
        name: Name of the parameter.
        parameter: The parameter, as in ``named_parameters()``.

    Raises:
        PlanError: If it was never loaded.
    """
    if not parameter.is_meta:
        return parameter.detach()
    holder, _, key = name.rpartition(".")
    module: Any = model.get_submodule(holder)
    if key == "weight" and hasattr(module, "dense_weight"):  # an accelerated layer
        weight: Tensor = module.dense_weight()
        return weight
    from transformers.integrations.accelerate import load_offloaded_parameter

    try:
        return load_offloaded_parameter(model, name)  # type: ignore[arg-type]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PlanError(
            f"{name} is on the meta device, and no hook of accelerate holds its values: load the model's weights first"
        ) from error


def refuse_offloaded(model: nn.Module, what: str) -> None:
    """Make sure that all weights of a model are loaded and not offloaded.

    Args:
        model: Any torch module.
        what: The function that needs them, for messages: ``"export_model()"``.

    Raises:
        PlanError: If a parameter is on the meta device.
    """
    refuse_accelerated(model, what)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise PlanError(
                f"{name} is on the meta device (offloaded or not loaded), where {what} does not reach it: load the "
                f"model without offloading, on devices with room for all of it"
            )


def refuse_accelerated(model: nn.Module, what: str) -> None:
    """Make sure that no layer of a model runs on a kernel with a copy of its weights.

    Args:
        model: Any torch module.
        what: The function that writes weights, for messages: ``"shrink()"``.

    Raises:
        PlanError: If one does.
    """
    for name, module in model.named_modules():
        if hasattr(module, "dense_weight"):
            raise PlanError(f"{name} is accelerated, with a copy of its weights: call decelerate() before {what}")
