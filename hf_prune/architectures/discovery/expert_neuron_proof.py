"""Prove on a small model that neurons inside experts can be removed: that gives what zeros in their place give."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.discovery.proof import cut_failure
from hf_prune.architectures.discovery.sample import Sample
from hf_prune.architectures.modules import base_prefix
from hf_prune.architectures.unit_groups import UnitGroup, UnitSlice, staying_mask

Kind = tuple[Any, ...]


def kind_of_neurons(model: nn.Module, group: UnitGroup) -> Kind:
    """What groups of one kind have in common, whatever their layer, their expert and their sizes.

    Args:
        model: The model.
        group: Neurons of its experts.
    """
    ((stack, number),) = group.layers
    layer = f"{stack}.{number}"
    slices = tuple(
        (re.sub(r"\d+", "*", piece.name.removeprefix(layer)), piece.dim, piece.width > 1, len(piece.offsets) > 1)
        for piece in group.slices
    )
    return (stack.removeprefix(base_prefix(model)), slices)


def neuron_failures(sample: Sample, groups: Sequence[UnitGroup]) -> Mapping[Kind, str | None]:
    """By kind of group, why its units cannot be removed; None if they can.

    Args:
        sample: The small model.
        groups: Neurons of its experts.
    """
    dense = sample.outputs()
    by_kind: dict[Kind, list[UnitGroup]] = {}
    for group in groups:
        by_kind.setdefault(kind_of_neurons(sample.model, group), []).append(group)
    return {kind: _failure(sample, members, dense) for kind, members in by_kind.items()}


@torch.no_grad()
def _failure(sample: Sample, groups: Sequence[UnitGroup], dense: Sequence[Tensor]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    kept: dict[str, Tensor] = {}
    zeroed = sample.twin()
    for group in groups:
        number = max(group.units - group.step, group.units // 2, 1)
        if number == group.units:
            return f"a small model has {group.units} of them, of which none can be tried"
        orders = torch.rand(group.choices or 1, group.units, generator=generator).argsort(1)
        chosen = orders[:, :number].sort(dim=1).values
        kept[group.name] = chosen if group.choices else chosen[0]
        for piece in group.consumers:
            _zero_others(zeroed, piece, kept[group.name])
    return cut_failure(sample, groups, kept, sample.outputs(zeroed), dense)


def _zero_others(model: nn.Module, piece: UnitSlice, kept: Tensor) -> None:
    """Zero what reads the units that do not stay, in a copy of the parameter."""
    holder, _, key = piece.name.rpartition(".")
    parameter = model.get_parameter(piece.name).detach()
    stays = staying_mask(parameter, piece.dim, piece.index(kept))
    model.get_submodule(holder)._parameters[key] = nn.Parameter(parameter * stays, requires_grad=False)
