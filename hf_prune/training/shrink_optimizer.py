"""Shrink a model in the middle of a training: the optimizer goes on with the state of the weights that stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hf_prune.architectures.unit_groups import selected
from hf_prune.errors import ConfigError
from hf_prune.structured.shrink import shrink_modules


def shrink_with_optimizer(model: nn.Module, optimizer: Any) -> Callable[[str, Tensor], Tensor]:
    """Shrink a model in place, and cut the state of its optimizer, such as moments, to the new shapes.

    Args:
        model: The model.
        optimizer: The optimizer of its parameters.

    Returns:
        A function that takes the name of a parameter and a tensor of its former shape, and returns what is left of it.

    Raises:
        ConfigError: If the optimizer's state is not shaped like the weights.
        ArchitectureError: If the architecture of the model is not registered.
    """
    _check_state(optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    cuts: list[tuple[str, int, Tensor]] = []
    shrink_modules(model, cuts)
    cuts_of: dict[str, list[tuple[int, Tensor]]] = {}
    for name, dim, index in cuts:
        cuts_of.setdefault(name, []).append((dim, index))

    def cut(name: str, tensor: Tensor) -> Tensor:
        for dim, index in cuts_of.get(name, ()):
            tensor = selected(tensor, dim, index)
        return tensor.contiguous()

    parameters = dict(model.named_parameters())
    for group in optimizer.param_groups:
        for i, old in enumerate(group["params"]):
            name = names[id(old)]
            if name in cuts_of:
                group["params"][i] = parameters[name]
                state = optimizer.state.pop(old, {})
                optimizer.state[parameters[name]] = {
                    key: cut(name, value) if isinstance(value, Tensor) and value.shape == old.shape else value
                    for key, value in state.items()
                }
    return cut


def _check_state(optimizer: Any) -> None:
    for parameter, state in optimizer.state.items():
        odd = [k for k, v in state.items() if isinstance(v, Tensor) and v.dim() and v.shape != parameter.shape]
        if odd:
            raise ConfigError(
                f"the state {odd[0]!r} of {type(optimizer).__name__} is not shaped like its weight, and cannot be "
                f"carried over when the model is shrunk: train with AdamW or SGD, or leave shrink_at out"
            )
