"""Weights offloaded by accelerate: the model holds placeholders on the meta device instead."""

from __future__ import annotations

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
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise PlanError(
                f"{name} is on the meta device (offloaded or not loaded), where {what} does not reach it: load the "
                f"model without offloading, on devices with room for all of it"
            )
