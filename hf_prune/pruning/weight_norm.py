"""Weights that weight norm computes: their directions are pruned, and something has to be left of each slice."""

from __future__ import annotations

from torch import Tensor, nn

from hf_prune.errors import PlanError
from hf_prune.kernels.matrix import Target
from hf_prune.planning.prunable import WEIGHT_NORM


def largest_of_slices(model: nn.Module, target: Target, weight: Tensor) -> Tensor | None:
    """The largest weight of each slice that weight norm divides by its length, which therefore goes last.

    Args:
        model: The model.
        target: One of its weights.
        weight: Its values.

    Returns:
        (out, in) bool; None if weight norm does not compute it.
    """
    if not target.name.endswith(WEIGHT_NORM):
        return None
    lengths = model.get_parameter(target.name.removesuffix("1") + "0")
    size = weight.abs()
    return target.matrix(size == size.amax([dim for dim, n in enumerate(lengths.shape) if n == 1], keepdim=True))


def check_directions(name: str, keep: Tensor, lengths: Tensor) -> None:
    """Make sure that something is left of every slice that weight norm divides by its length.

    Raises:
        PlanError: If not.
    """
    left = keep
    for dim, size in enumerate(lengths.shape):
        if size == 1:
            left = left.any(dim, keepdim=True)
    if not bool(left.all()):
        raise PlanError(
            f"nothing would be left of {int((~left).sum())} of {left.numel()} slices of {name}, which weight norm "
            f"divides by their lengths: ask for less or in scope 'row', list the module in exclude_modules, or call "
            f"torch.nn.utils.parametrize.remove_parametrizations first"
        )
