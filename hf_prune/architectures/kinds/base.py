"""The interface of a kind of unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_prune.architectures.settings import set_setting
from hf_prune.architectures.switched_off import units_that_run
from hf_prune.architectures.unit_groups import UnitGroup

# Where configs of transformers name the function between the two matrices of a feed-forward network.
_ACTIVATIONS = ("hidden_act", "activation_function", "activation", "dense_act_fn", "hidden_activation")


class UnitKind:
    """A kind of unit that is removed as a whole. Subclass it, and register the class in a file of this folder.

    The default methods suit units that are slices of parameters, so most kinds only override :meth:`groups`: masking,
    counting, budgets, cutting and the checkpoint's record follow from the slices.

    Attributes:
        name: What ``granularity=`` calls it; its plural takes an "s".
        description: What ``hf-prune list`` says of it.
        position: Where it stands in lists and inside a layer; kinds of the same position are sorted by name.
        is_granularity: Whether ``granularity=`` takes it. ``"channel"`` is a granularity of single weights instead.
        cut_as: The kind that these units are made of, if they regroup units of another one, such as pairs of neurons.
            They are chosen and masked together; ``shrink()`` cuts, and a checkpoint records, the units of that kind.
        scopes: The scopes in which its units can compete.
        objectives: What a repair after pruning them may minimise.
        criteria: Names of the criteria that rank it; None for all criteria of units.
        preferred: The criterion that presets choose where there are texts and these are the only units to go; None for
            that of the preset.
        trained_with_masks: Whether a training can prune its units little by little.
        zeros_suffice: Whether a unit of zero weights does nothing. Where it still does, masked units are also switched
            off, see ``hf_prune.architectures.switched_off``, and those are what ``shrink()`` cuts.
        repairs: Whether what is left after pruning them can be repaired or polished.
        fine_shares: The shares of its units at which the time of a forward pass is measured, besides all of them.
        coarse_shares: The same where a forward pass takes long.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    position: ClassVar[int] = 100
    is_granularity: ClassVar[bool] = True
    cut_as: ClassVar[str | None] = None
    scopes: ClassVar[frozenset[str]] = frozenset({"layer", "global"})
    objectives: ClassVar[frozenset[str]] = frozenset({"layer", "loss"})
    criteria: ClassVar[frozenset[str] | None] = None
    preferred: ClassVar[str | None] = None
    trained_with_masks: ClassVar[bool] = True
    zeros_suffice: ClassVar[bool] = True
    repairs: ClassVar[bool] = True
    fine_shares: ClassVar[tuple[float, ...]] = (0.0, 0.25, 0.5, 0.75)
    coarse_shares: ClassVar[tuple[float, ...]] = (0.0, 0.5)

    def groups(self, model: nn.Module) -> list[UnitGroup]:
        """Where units of this kind lie in a model, layer by layer; empty if it has none.

        Raises:
            ArchitectureError: If the architecture is not registered, or its modules are not where the table says.
        """
        return []

    def removable_layers(self, model: nn.Module, is_excluded: Callable[[str], bool]) -> list[str]:
        """Names of the layers that are units of this kind: they are bypassed rather than sliced.

        Args:
            model: The model.
            is_excluded: Whether a layer is to be spared, by its name.
        """
        return []

    def silent_units(self, model: nn.Module, group: UnitGroup) -> Tensor:
        """(units,) bool: the units that change nothing in the output of the model.

        By default those that nothing reads, or that compute zero because their slices of ``group.values`` are zero;
        where zeros do not suffice, those that are switched off.
        """
        if not self.zeros_suffice:
            kept = units_that_run(model, group)
            silent = torch.full((group.units,), kept is not None)
            return silent if kept is None else silent.index_fill(0, kept, False)
        silent = group.is_zero(model, group.consumers)
        return silent | group.is_zero(model, group.values) if group.values else silent

    def obstacles(self, model: nn.Module) -> list[str]:
        """Why units of this kind that a model seems to have cannot be removed, in one sentence each."""
        return []

    def config_values(self, group: UnitGroup) -> dict[str, int]:
        """Attributes of a config that builds a model whose groups all have the units of this one.

        Empty if no config can say so; the sizes are then recorded by the names of the groups.
        """
        values = {name: group.units * n for name, n in zip(group.config, group.per_unit, strict=True)}
        if group.size is not None:
            values[group.size[1]] = group.size[0]
        return values

    def write_config(self, model: nn.Module, group: UnitGroup) -> None:
        """Write into the config of a model that all groups like this one have as many units."""
        for name, value in self.config_values(group).items():
            set_setting(model.config, name, value)


def activation_is_zero_at_zero(model: nn.Module) -> bool:
    """Whether the function of a model's feed-forward networks maps zero to zero; False if it cannot be told."""
    from transformers.activations import ACT2FN

    names = [name for key in _ACTIVATIONS if isinstance(name := getattr(model.config, key, None), str)]
    if not names or names[0] not in ACT2FN:
        return False
    return float(ACT2FN[names[0]](torch.zeros(1))) == 0
