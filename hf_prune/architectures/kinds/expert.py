"""Experts: the feed-forward networks among which a router chooses for each token."""

from __future__ import annotations

from torch import nn

from hf_prune.architectures.discovery.proven_experts import proven_blocks
from hf_prune.architectures.expert_groups import expert_group
from hf_prune.architectures.kinds.base import UnitKind
from hf_prune.architectures.kinds.registry import KINDS
from hf_prune.architectures.moe_blocks import unusable_experts
from hf_prune.architectures.unit_groups import UnitGroup


@KINDS.register("expert")
class Expert(UnitKind):
    """All weights of an expert, and what its router has for it: a row, a bias, a correction.

    A router also sends tokens to an expert of zeros. A masked model therefore runs its layers without the experts that
    were removed, as the shrunk model does: the router chooses among the others, and weighs them alike.
    """

    name = "expert"
    description = "experts of a mixture, with their rows of the router; as many stay as a token needs"
    position = 2
    objectives = frozenset({"layer"})
    criteria = frozenset({"reap", "frequency", "magnitude", "random"})
    trained_with_masks = False  # switching an expert off changes at once where tokens go
    zeros_suffice = False
    repairs = False

    def groups(self, model: nn.Module) -> list[UnitGroup]:
        """See :meth:`UnitKind.groups`."""
        return [expert_group(model, block) for block in proven_blocks(model)[0]]

    def obstacles(self, model: nn.Module) -> list[str]:
        """See :meth:`UnitKind.obstacles`."""
        return [*unusable_experts(model), *proven_blocks(model)[1]]

    def write_config(self, model: nn.Module, group: UnitGroup) -> None:
        """See :meth:`UnitKind.write_config`."""
        super().write_config(model, group)
        for block in proven_blocks(model)[0]:
            if block.config in group.config:
                for name, attribute in block.outer_counts:
                    setattr(model.get_submodule(name), attribute, group.units)
