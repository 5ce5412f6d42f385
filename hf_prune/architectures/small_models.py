"""Small models with random weights, and inputs that a model's forward pass accepts, both made from the config alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.model_inputs import FORWARD_ERRORS, candidate_inputs
from hf_prune.architectures.small_configs import small_config
from hf_prune.errors import ArchitectureError
from hf_prune.utils.forward import device_of, eval_mode


def small_model(model_class: type[nn.Module], config: Any, seed: int = 0) -> Any:
    """A small model of a class, in eval mode, with random weights that are large enough to matter.

    Args:
        model_class: A transformers class.
        config: The config of a model of any size; it stays as it is.
        seed: Of the weights.

    Returns:
        The model, in float32. Weights of matrices have a standard deviation of one over the root of their inputs, and
        norms and biases differ from unit to unit, so that no two units are alike.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(small_config(config)).float()
        for name, parameter in model.named_parameters():
            randomize(name, parameter)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight.data[module.padding_idx] = 0  # as some classes set it whenever they load
    return model.eval()


@torch.no_grad()
def randomize(name: str, parameter: Tensor) -> None:
    """Give a parameter random values in place: norms near one, other vectors near zero, matrices by their inputs."""
    if not parameter.is_floating_point():
        return
    if parameter.dim() > 1:
        inputs = math.prod(parameter.shape[1:]) if parameter.dim() != 3 else parameter.shape[-1]
        parameter.normal_(0, min(1.0, inputs**-0.5))
    else:
        parameter.add_(torch.randn_like(parameter), alpha=0.1)


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Inputs that the forward pass of a model accepts: text, images, sound or several of them; always the same ones.

    Inputs are guessed from what ``forward`` takes and what the config says, and the first that the model runs on are
    returned. A model of images or sound and text gets as many placeholder tokens as the images or sounds have features.

    Args:
        model: A transformers model, best a small one: it is run a few times.

    Returns:
        Keyword arguments, two examples, 16 tokens unless an image needs more.

    Raises:
        ArchitectureError: If the model runs on none of them.
    """
    reason = ""
    device, dtype = (
        device_of(model),
        next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32),
    )
    with torch.random.fork_rng(devices=[]), eval_mode(model), torch.no_grad():
        for inputs in candidate_inputs(model):
            placed = {
                k: v.to(device, dtype if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v
                for k, v in inputs.items()
            }
            torch.manual_seed(0)  # some models draw noise
            try:
                model(**placed)
            except FORWARD_ERRORS as error:
                shapes = ", ".join(f"{k} {tuple(v.shape)}" if isinstance(v, Tensor) else k for k, v in inputs.items())
                reason = reason or f"on {shapes}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                continue
            return placed
    raise ArchitectureError(
        f"no example inputs are known for {type(model).__name__} (the first try failed {reason}): expected a model of "
        f"text, images or sound; pass inputs that it takes"
    )
