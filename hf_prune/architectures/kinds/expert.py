"""Experts: the feed-forward networks among which a router chooses for each token."""

from __future__ import annotations

from torch import nn

from hf_prune.architectures.kinds.base import UnitKind
from hf_prune.architectures.kinds.registry import KINDS
from hf_prune.architectures.modules import base_prefix
from hf_prune.architectures.moe_block import MoeBlock
from hf_prune.architectures.moe_blocks import removable_blocks, tokens_per_choice, unusable_experts
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
        prefix = base_prefix(model)
        return [_group(model, block, prefix) for block in removable_blocks(model)]

    def obstacles(self, model: nn.Module) -> list[str]:
        """See :meth:`UnitKind.obstacles`."""
        return unusable_experts(model)

    def write_config(self, model: nn.Module, group: UnitGroup) -> None:
        """See :meth:`UnitKind.write_config`."""
        super().write_config(model, group)
        for block in removable_blocks(model):
            if block.config in group.config:
                for name, attribute in block.outer_counts:
                    setattr(model.get_submodule(name), attribute, group.units)


def _group(model: nn.Module, block: MoeBlock, prefix: str) -> UnitGroup:
    """The experts of one block, as many as it has by now."""
    row = next(piece for piece in block.parameters if piece.name == block.router)
    minimum, runs = tokens_per_choice(model, block)
    units = model.get_parameter(row.name).shape[0]
    return UnitGroup(
        name=block.name.removeprefix(prefix),
        kind=Expert.name,
        units=units,
        producers=block.parameters,
        consumers=(),
        layers=(block.layer,),
        counts=block.counts,
        minimum=min(units, minimum),
        config=(block.config,),
        per_unit=(1,),
        buffers=block.buffers,
        lists=block.lists,
        runs=runs,
        origin="read off the class",
    )
