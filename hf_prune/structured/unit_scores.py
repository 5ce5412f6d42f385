"""What each unit of a group is worth, from its weights or from scores that a training has learned for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_prune.architectures.switched_off import units_that_run
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.criteria.base import derived_seed
from hf_prune.structured.gate_statistics import GateStatistics
from hf_prune.structured.loss_curves import Curve, additive_curve, fisher_curve
from hf_prune.utils.formatting import first_few
from hf_prune.utils.notices import warn_user

_NEXT_TO_NOTHING = 1e-30  # beside the scores of units that were seen


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


def gate_curve(model: nn.Module, group: UnitGroup, gates: GateStatistics, criterion: str) -> Curve:
    """The curve of the gradients of gates; where no token came, that of magnitude, as if it cost next to nothing.

    Args:
        model: The model.
        group: The group.
        gates: What was measured of it.
        criterion: ``"fisher"`` or ``"taylor"``.
    """
    is_square = gates.fisher.dim() == 2 and not group.choices
    scores = gates.fisher.diagonal() if is_square else gates.fisher
    if criterion == "taylor":
        scores = gates.absolute
    curve = additive_curve(scores_where_missed(model, group, scores, gates.missed))
    if criterion == "taylor" or not is_square or gates.missed:
        return curve
    # Groups compete by the diagonal; pairs only rearrange the units within a group (Kwon et al. 2022).
    return dataclasses.replace(curve, order=fisher_curve(gates.fisher).order)


def scores_where_missed(model: nn.Module, group: UnitGroup, scores: Tensor, missed: Sequence[int]) -> Tensor:
    """Scores in which experts that no token reached have those of magnitude, far below all others.

    Args:
        model: The model.
        group: Neurons of experts, or any other group.
        scores: (units,) or (choices, units).
        missed: Numbers of these experts.
    """
    if not missed:
        return scores
    by_slab = scores.double().cpu().reshape(-1, group.units).clone()
    weights = squared_weights(model, group).double().reshape(-1, group.units)
    for number in missed:
        by_slab[number] = _NEXT_TO_NOTHING * weights[number] / weights[number].sum().clamp_min(_NEXT_TO_NOTHING)
    return by_slab.view(scores.shape)


def warn_of_missed_experts(missed: Mapping[str, Sequence[int]], total: int) -> None:
    """Warn of experts that no token reached, whose neurons are ranked by magnitude.

    Args:
        missed: Their numbers, by group.
        total: How many there are.
    """
    names = [f"{name}[{number}]" for name, numbers in missed.items() for number in numbers]
    if names:
        warn_user(
            f"{len(names)} of {total} groups of neurons are in experts that saw no calibration token "
            f"({first_few(names)}): they are ranked by magnitude; calibrate on more texts, or name them in "
            f"exclude_modules"
        )


def warn_of_unused_experts(model: nn.Module, groups: Sequence[UnitGroup], tokens: Mapping[str, Tensor]) -> None:
    """Warn of experts that run and get no token: nothing is known of their outputs.

    Args:
        model: The model.
        groups: Groups of experts.
        tokens: (experts,) how many tokens each expert got, by the name of the group.
    """
    running = {group.name: units_that_run(model, group) for group in groups}
    unused = [
        f"{group.name}[{number}]"
        for group in groups
        for number in (tokens[group.name] == 0).nonzero().flatten().tolist()
        if (some := running[group.name]) is None or number in some
    ]
    if unused:
        total = sum(group.units if (some := running[group.name]) is None else len(some) for group in groups)
        warn_user(
            f"{len(unused)} of {total} experts saw no calibration token ({first_few(unused)}): they count for nothing "
            f"and go first; calibrate on more texts, or name their blocks in exclude_modules"
        )


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
        slices = [piece for piece in group.slices if piece.name in scores]
        weights = [piece.by_unit(scores[piece.name], group.units, group.choices) for piece in slices]
        totals[group.name] = torch.stack([weight.float().sum(-1) for weight in weights]).sum(0)
        sizes[group.name] = sum(weight.shape[-1] for weight in weights)
    lowest = min(0.0, *(float(totals[name].min()) / sizes[name] for name in totals))
    return {name: additive_curve(total - lowest * sizes[name]) for name, total in totals.items()}
