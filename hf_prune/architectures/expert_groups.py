"""The experts of a mixture as units."""

from __future__ import annotations

from torch import nn

from hf_prune.architectures.modules import base_prefix
from hf_prune.architectures.moe_block import MoeBlock
from hf_prune.architectures.moe_blocks import tokens_per_choice
from hf_prune.architectures.settings import config_of_setting
from hf_prune.architectures.unit_groups import FOUND, UnitGroup


def expert_group(model: nn.Module, block: MoeBlock) -> UnitGroup:
    """The experts of one block, as many as it has by now.

    Args:
        model: The model.
        block: A mixture of experts in it.
    """
    row = next(piece for piece in block.parameters if piece.name == block.router)
    minimum, runs = tokens_per_choice(model, block)
    units = model.get_parameter(row.name).shape[0]
    return UnitGroup(
        name=block.name.removeprefix(base_prefix(model)),
        kind="expert",
        units=units,
        producers=block.parameters,
        consumers=(),
        layers=(block.layer,),
        counts=block.counts + (_counts_in_config(model, block) if block.reads_config else ()),
        minimum=min(units, max(minimum, block.least)),
        config=(block.config,) if block.is_rebuilt else (),
        per_unit=(1,) if block.is_rebuilt else (),
        buffers=block.buffers,
        lists=block.lists,
        runs=runs,
        origin=FOUND,
    )


def _counts_in_config(model: nn.Module, block: MoeBlock) -> tuple[tuple[str, str], ...]:
    """Where the code of a block finds the number of experts in the config, as an attribute of one of its modules."""
    config, key = config_of_setting(model.config, block.config)
    layer = f"{block.layer[0]}.{block.layer[1]}"
    for name, module in model.get_submodule(layer).named_modules():
        for attribute, value in vars(module).items():
            if value is config:
                return ((f"{layer}.{name}".rstrip("."), f"{attribute}.{key}"),)
    return ()
