"""A mixture of experts in one layer of a model, and whether the model has it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_prune.architectures.modules import find_tensor
from hf_prune.architectures.unit_groups import UnitSlice, numbered


@dataclass(frozen=True)
class MoeBlock:
    """A mixture of experts in one layer. All names are those of the model.

    Args:
        name: The module that holds the experts.
        layer: The layer that it is in, as (list of layers, number).
        config: The setting that counts the experts, with dots between a config and the one inside it.
        router: The weight with a row for each expert that chooses among them.
        parameters: Parts of parameters that belong to one expert each, that weight among them.
        buffers: The same for buffers, such as corrections of the router's scores.
        lists: Lists or dicts of modules with one module for each expert.
        counts: Attributes of modules in the layer that are proportional to the number of experts.
        outer_counts: Such attributes outside of the layers, which speak of all of them.
        table: A tensor of whole numbers at the router, which may be numbers of experts; empty if there is none.
        reads_config: Whether the code looks up how many there are in the config while it runs, so that all layers must
            have as many.
        is_rebuilt: Whether a config that counts fewer builds the model that is left once experts are cut out.
        least: How many experts must stay, where that is more than the model says.
    """

    name: str
    layer: tuple[str, int]
    config: str
    router: str
    parameters: tuple[UnitSlice, ...]
    buffers: tuple[UnitSlice, ...] = ()
    lists: tuple[str, ...] = ()
    counts: tuple[tuple[str, str], ...] = ()
    outer_counts: tuple[tuple[str, str], ...] = ()
    table: str = ""
    reads_config: bool = False
    is_rebuilt: bool = True
    least: int = 0


def misfit(model: nn.Module, block: MoeBlock) -> str | None:
    """What a model does not have as its config says, whose modules may have been changed by hand.

    Args:
        model: The model.
        block: A mixture of experts, as the model's class and config promise it.

    Returns:
        One sentence; None if everything is there.
    """
    experts = f"config.{block.config} counts the experts of {type(model).__name__}"
    advice = "so none can be removed: make the model and its config agree first"
    router = find_tensor(model, block.router)
    units = 0 if router is None or not router.ndim else router.shape[0]
    for piece in (*block.parameters, *block.buffers):
        tensor = find_tensor(model, piece.name)
        if tensor is None:
            return f"{experts}, which has no {piece.name}, {advice}"
        if tensor.ndim <= piece.dim or tensor.shape[piece.dim] != units * piece.width:
            shape = tuple(tensor.shape)
            return f"{experts}, whose {piece.name} of the shape {shape} has no part for each of {units}, {advice}"
    for name in block.lists:
        try:
            number = len(numbered(model.get_submodule(name)))
        except AttributeError:
            return f"{experts}, which has no {name}, {advice}"
        if number != units:
            return f"{experts}, whose {name} has {number}, and whose router has {units}, {advice}"
    return None
