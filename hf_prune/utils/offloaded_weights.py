"""Weights that accelerate has offloaded: the model holds placeholders on the meta device in their place."""

from __future__ import annotations

from torch import Tensor, nn

from hf_prune.errors import PlanError


def values_of(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """A parameter's values, read from where they are if it is offloaded; they are not to be written to.

    Args:
        model: The model that has the hooks of accelerate.
        name: Of the parameter.
        parameter: As ``named_parameters()`` gives it.

    Raises:
        PlanError: If it has no values: it was never loaded.
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
    """Make sure that a model holds all of its weights.

    Args:
        model: Any torch module.
        what: What is to be done and cannot do without.

    Raises:
        PlanError: If one is on the meta device.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise PlanError(
                f"{name} is on the meta device (offloaded or not loaded), where {what} does not reach it: load the "
                f"model without offloading, on devices with room for all of it"
            )
