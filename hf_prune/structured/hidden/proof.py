"""What a model with fewer dimensions of the hidden states has to compute, and whether it does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.utils.forward import run_model, tensors_in

_CLOSE = 1e-5  # of the largest value of an output, by which it may differ in float32

Cuts = Mapping[str, tuple[int, ...]]  # by parameter or buffer: the dimensions along which hidden states lie


def norms_of(model: nn.Module, cuts: Cuts) -> dict[str, nn.Module]:
    """Modules that scale each dimension of the hidden states: all they hold is vectors of that size."""
    norms = {}
    for name, module in model.named_modules():
        own = [f"{name}.{key}" for key, p in module._parameters.items() if p is not None]
        if own and not module._modules and all(cuts.get(key) == (0,) for key in own):
            if all(model.get_parameter(key).dim() == 1 for key in own):
                norms[name] = module
    return norms


@torch.no_grad()
def greatest_difference(
    model: nn.Module, smaller: nn.Module, cuts: Cuts, kept: Tensor, inputs: Mapping[str, Any]
) -> float:
    """How far a smaller model is from what it has to compute, in float32.

    That is what the model computes if nothing writes into the dimensions that go, and norms see the others alone.

    Args:
        model: The model, in eval mode; it stays as it is.
        smaller: The smaller one, in float32.
        cuts: Where hidden states lie.
        kept: (size,) the dimensions that stay.
        inputs: What both are run on.

    Returns:
        The greatest difference as a share of the largest value of the same output; infinite if there are others.
    """
    reference = copy.deepcopy(model).float()
    tensors = dict(reference.named_parameters()) | dict(reference.named_buffers())
    before = next(tensors[name].shape[dims[0]] for name, dims in cuts.items())
    gone = torch.ones(before, dtype=torch.bool).index_fill(0, kept.cpu(), False).nonzero().reshape(-1)
    for name, dims in cuts.items():
        for dim in dims:
            tensors[name].index_fill_(dim, gone.to(tensors[name].device), 0)
    for name, norm in norms_of(reference, cuts).items():
        norm.forward = _of_some(smaller.get_submodule(name), kept)
    expected = [t for t in tensors_in(run_model(reference, inputs)) if t.is_floating_point()]
    found = [t for t in tensors_in(run_model(smaller, inputs)) if t.is_floating_point()]
    if len(expected) != len(found):
        return float("inf")
    return max(map(lambda a, b: _difference(a, b, kept), expected, found), default=float("inf"))


def is_close(difference: float) -> bool:
    """Whether a difference is one of rounding."""
    return difference <= _CLOSE


def _of_some(norm: nn.Module, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """The forward pass of a norm that sees some dimensions alone, and gives zero for the others."""

    def forward(hidden_states: Tensor) -> Tensor:
        index = kept.to(hidden_states.device)
        return torch.zeros_like(hidden_states).index_copy(-1, index, norm(hidden_states[..., index]))

    return forward


def _difference(expected: Tensor, found: Tensor, kept: Tensor) -> float:
    if expected.shape != found.shape and found.shape[-1:] == kept.shape:  # hidden states themselves
        expected = expected[..., kept.to(expected.device)]
    if expected.shape != found.shape:
        return float("inf")
    difference = float((expected - found).abs().max()) / max(1e-30, float(expected.abs().max()))
    return difference if difference == difference else float("inf")  # nan
