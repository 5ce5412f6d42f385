"""Which units still do anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.unit_groups import UnitGroup

# Where configs of transformers name the function between the two matrices of a feed-forward network.
_ACTIVATIONS = ("hidden_act", "activation_function", "activation", "dense_act_fn", "hidden_activation")


def surviving_units(model: nn.Module, site: UnitGroup) -> Tensor | None:
    """The units of a site that stay, None if all do."""

    def is_zero(parts: tuple[Any, ...]) -> Tensor:
        units = [p.by_unit(model.get_parameter(p.name).detach(), site.units) for p in parts]
        return torch.stack([(part == 0).all(1) for part in units]).all(0)

    if site.units == 0:
        return None
    dead = is_zero(site.consumers)
    if site.kind == "head":
        dead |= is_zero(site.values)
    elif site.kind == "channel":
        if activation_is_zero_at_zero(model):
            dead |= is_zero(site.values)
    elif activation_is_zero_at_zero(model):
        weights = [p for p in site.producers if p.name.endswith(".weight")]
        for weight in weights:  # of a gated network either factor will do
            bias = [p for p in site.producers if p.name == weight.name.removesuffix("weight") + "bias"]
            dead |= is_zero((weight, *bias))
    alive = (~dead).nonzero().reshape(-1)
    if len(alive) < site.minimum:
        alive = torch.arange(site.minimum, device=alive.device)  # their weights are zero: they change nothing
    return None if len(alive) == site.units else alive


def activation_is_zero_at_zero(model: nn.Module) -> bool:
    """Whether the function of a model's feed-forward networks maps zero to zero; False if it cannot be told."""
    from transformers.activations import ACT2FN

    names = [name for key in _ACTIVATIONS if isinstance(name := getattr(model.config, key, None), str)]
    if not names or names[0] not in ACT2FN:
        return False
    return float(ACT2FN[names[0]](torch.zeros(1))) == 0
