"""Weights that weight norm computes: their directions are pruned, and something has to be left of each slice.

The length of a direction has no effect, slice by slice, so weights are ranked by what the layer multiplies with. Where
others go, the lengths beside the directions shrink to match, so that the weights that stay keep their values. Criteria
that learn from gradients see those of the directions, for which the lengths are given: there they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hf_prune.criteria.base import CURVATURE, GRADIENTS, TRAINED
from hf_prune.errors import PlanError
from hf_prune.kernels.matrix import Target
from hf_prune.planning.plan import PruningPlan
from hf_prune.planning.prunable import WEIGHT_NORM


def lengths_name(name: str) -> str | None:
    """The name of the lengths that belong to a weight; None if weight norm does not compute it."""
    return name.removesuffix("1") + "0" if name.endswith(WEIGHT_NORM) else None


def keeps_values(plan: PruningPlan) -> bool:
    """Whether weights under weight norm are ranked by their own values, and keep them."""
    return not plan.criterion.needs & (GRADIENTS | CURVATURE | TRAINED)


def effective_weight(name: str, parameter: Callable[[str], Tensor]) -> Tensor:
    """What a layer multiplies with: lengths times directions where weight norm computes it, else the parameter itself.

    Args:
        name: The parameter's name.
        parameter: Gives parameters by name.
    """
    weight = parameter(name).detach()
    if (lengths := lengths_name(name)) is None:
        return weight
    given = parameter(lengths).detach()
    return weight * (given / _norm(weight, given))


def lengths_left(
    plan: PruningPlan,
    name: str,
    keep: Tensor,
    previous_masks: Mapping[str, Tensor],
    parameter: Callable[[str], Tensor],
) -> dict[str, Tensor]:
    """The lengths with which the weights that stay keep their values.

    Args:
        plan: The plan.
        name: The name of a weight.
        keep: Its bool mask, True = keep.
        previous_masks: Masks of earlier prunings, by parameter name.
        parameter: Gives parameters by name, as they are before anything is removed.

    Returns:
        By parameter name; nothing if weight norm does not compute the weight, or its criterion learns from gradients.

    Raises:
        PlanError: If nothing is left of a slice.
    """
    if (lengths_of := lengths_name(name)) is None:
        return {}
    weight, lengths = parameter(name).detach(), parameter(lengths_of).detach()
    check_directions(name, keep, lengths)
    if not keeps_values(plan):
        return {}
    if (old := previous_masks.get(name)) is not None:
        keep = keep & old.to(keep.device)
    ratio = _norm(weight * keep, lengths) / _norm(weight, lengths)
    return {lengths_of: (lengths * ratio.reshape(lengths.shape)).to(lengths.dtype)}


def _slice_dims(weight: Tensor, lengths: Tensor) -> list[int]:
    """The dimensions that a slice spans: all of them if the whole weight has one length."""
    return [dim for dim in range(weight.dim()) if lengths.dim() == 0 or lengths.shape[dim] == 1]


def _norm(weight: Tensor, lengths: Tensor) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=_slice_dims(weight, lengths), keepdim=True, dtype=dtype)


def largest_of_slices(model: nn.Module, target: Target, weight: Tensor) -> Tensor | None:
    """The largest weight of each slice that weight norm divides by its length, which therefore goes last.

    Args:
        model: The model.
        target: One of its weights.
        weight: Its values.

    Returns:
        (out, in) bool; None if weight norm does not compute it.
    """
    if (lengths := lengths_name(target.name)) is None:
        return None
    size = weight.abs()
    return target.matrix(size == size.amax(_slice_dims(weight, model.get_parameter(lengths)), keepdim=True))


def check_directions(name: str, keep: Tensor, lengths: Tensor) -> None:
    """Make sure that something is left of every slice that weight norm divides by its length.

    Raises:
        PlanError: If not.
    """
    left = keep
    for dim in _slice_dims(keep, lengths):
        left = left.any(dim, keepdim=True)
    if not bool(left.all()):
        raise PlanError(
            f"nothing would be left of {int((~left).sum())} of {left.numel()} slices of {name}, which weight norm "
            f"divides by their lengths: ask for less or in scope 'row', list the module in exclude_modules, or call "
            f"torch.nn.utils.parametrize.remove_parametrizations first"
        )
