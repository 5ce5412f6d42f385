"""What each unit of a group is worth, from its weights or from scores that a training has learned for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_prune.architectures.switched_off import units_that_run
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.criteria.base import derived_seed
from hf_prune.structured.loss_curves import Curve, additive_curve


def curve_of_scores(model: nn.Module, group: UnitGroup, scores: Tensor) -> Curve:
    """The curve of scores of units. Units that are switched off already are the first to go, and cost nothing.

    Args:
        model: The model.
        group: The group.
        scores: (units,) not negative.
    """
    if (running := units_that_run(model, group)) is not None:
        least = torch.finfo(torch.float32).tiny
        scores = torch.zeros_like(scores).index_copy(0, running, scores[running].clamp_min(least))
    return additive_curve(scores, group.runs)


def random_scores(model: nn.Module, group: UnitGroup, seed: int) -> Tensor:
    """(units,) or (choices, units) random numbers, scaled by the size of a unit: large ones are not cheap to remove."""
    generator = torch.Generator().manual_seed(derived_seed(seed, group.name))
    sizes = (group.choices, group.units) if group.choices else (group.units,)
    return torch.rand(sizes, generator=generator) * group.parameters_per_unit(dict(model.named_parameters()))


def squared_weights(model: nn.Module, group: UnitGroup) -> Tensor:
    """(units,) or (choices, units) the sum of squares of everything that belongs to a unit."""
    total = torch.zeros(())
    for piece in group.slices:
        entries = piece.by_unit(model.get_parameter(piece.name).detach(), group.units, group.choices)
        total = total + entries.float().square().sum(-1).cpu()
    if not group.lists:
        return total
    own = group.own_parameters(model, range(group.units))
    return total + torch.tensor([sum(sum_of_squares(model.get_parameter(n)) for n in names) for names in own])


def sum_of_squares(parameter: Tensor) -> float:
    """The sum of squares of the entries of a parameter."""
    return float(parameter.detach().float().square().sum())


def learned_curves(groups: Sequence[UnitGroup], scores: Mapping[str, Tensor]) -> dict[str, Curve]:
    """Curves from scores of weights.

    Scores of movement may be negative. All weights are lifted by the same amount, so that a unit's score still is a sum
    over its weights, and no unit gains by being larger.

    Args:
        groups: The groups.
        scores: Scores of each weight, by parameter name.
    """
    totals, sizes = {}, {}
    for group in groups:
        weights = [piece.by_unit(scores[piece.name], group.units) for piece in group.slices if piece.name in scores]
        totals[group.name] = torch.stack([weight.float().sum(1) for weight in weights]).sum(0)
        sizes[group.name] = sum(weight.shape[1] for weight in weights)
    lowest = min(0.0, *(float(totals[name].min()) / sizes[name] for name in totals))
    return {name: additive_curve(total - lowest * sizes[name]) for name, total in totals.items()}
