"""Find the mixtures of experts in a model: what belongs to one expert, and which setting of the config counts them.

Names of routers, biases and counters differ from family to family, so none of them is assumed. The model's class is
built twice on the meta device, as its config says and with twice as many experts. What is twice as large in the second
model has a part for each expert; a list that is twice as long holds the experts themselves.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_prune.architectures.growth import Growth, built, growth
from hf_prune.architectures.memory import remembered, text_of
from hf_prune.architectures.modules import is_saved
from hf_prune.architectures.moe_block import MoeBlock, misfit
from hf_prune.architectures.moe_settings import expert_settings, is_named
from hf_prune.architectures.settings import config_of_setting, set_setting
from hf_prune.architectures.unit_groups import UnitSlice

_LAYER = re.compile(r"(.*?\.?\d+)\.")  # the outermost numbered module
_TOP_K = re.compile(r"top_?k|per_tok|(^|_)k$|num_selected|n(um)?_(active|chosen)")
_ROUTER_GROUPS = ("num_group", "n_group", "n_groups", "num_expert_group", "num_expert_groups")
_CHOSEN_GROUPS = ("topk_group", "topk_groups")
_LEAST_CHOSEN = 2  # experts per token where the model does not say how many


_CACHE: dict[tuple[type, str], tuple[list[MoeBlock], list[str]]] = {}


def moe_blocks(model: nn.Module) -> list[MoeBlock]:
    """The mixtures of experts of a model, layer by layer; none whose experts cannot be told apart.

    None either of those that a setting counts if the model lacks one of them, or has it in another form.

    Args:
        model: A transformers model; for any other one the list is empty. Its layers may have different sizes by now.
    """
    return _look(model)[0]


def removable_blocks(model: nn.Module) -> list[MoeBlock]:
    """The mixtures whose experts can be removed: where no router has a table, and all parts of experts are saved.

    What holds of one mixture holds of all that the same setting counts.
    """
    blocks = moe_blocks(model)
    fixed = {
        block.config
        for block in blocks
        if block.table or not all(is_saved(model, piece.name) for piece in block.buffers)
    }
    return [block for block in blocks if block.config not in fixed]


def unusable_experts(model: nn.Module) -> list[str]:
    """Why experts of a model cannot be removed, one sentence for each setting that counts some."""
    return _look(model)[1]


def tokens_per_choice(model: nn.Module, block: MoeBlock) -> tuple[int, int]:
    """How many experts must stay in a block, and into how many groups its router divides them.

    A token goes to ``top_k`` experts. A router with groups compares the two best experts of each, and chooses among the
    experts of a few groups.

    Returns:
        (experts that must stay, router groups). Every group must keep as many experts as every other.
    """
    layer = f"{block.layer[0]}.{block.layer[1]}"
    holders = [model.get_submodule(name) for name in _path(_owner(block.router), layer)]
    config, _ = config_of_setting(model.config, block.config)
    chosen = _integer(holders, lambda key: bool(_TOP_K.search(key)) and "group" not in key)
    if chosen is None:
        chosen = _integer([config], lambda key: bool(_TOP_K.search(key)) and "group" not in key)
    groups = _integer(holders, _ROUTER_GROUPS.__contains__) or 1
    chosen_groups = _integer(holders, _CHOSEN_GROUPS.__contains__) or 1
    chosen = _LEAST_CHOSEN if chosen is None else chosen
    if groups == 1:
        return chosen, 1
    return groups * max(2, -(-chosen // chosen_groups)), groups


def _integer(objects: list[Any], is_meant: Any) -> int | None:
    """The first attribute of some objects that has a certain name and holds a whole number."""
    for thing in objects:
        for key, value in vars(thing).items():
            if is_meant(key) and isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _path(inner: str, outer: str) -> Iterator[str]:
    """Names of a module and of those around it, up to another one."""
    yield inner
    while inner != outer:
        inner = _owner(inner)
        yield inner


def _look(model: nn.Module) -> tuple[list[MoeBlock], list[str]]:
    from transformers import PreTrainedModel

    config: Any = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or not (settings := expert_settings(model)):
        return [], []
    key = type(model), text_of(config)
    blocks, reasons = remembered(_CACHE, key, lambda: _compare(type(model), config, settings))
    misfits = {block.config: said for block in reversed(blocks) if (said := misfit(model, block))}
    return [block for block in blocks if block.config not in misfits], [*reasons, *misfits.values()]


def _compare(cls: type, config: Any, settings: list[tuple[str, int]]) -> tuple[list[MoeBlock], list[str]]:
    blocks: list[MoeBlock] = []
    reasons: list[str] = []
    try:
        plain = built(cls, config)
    except Exception as error:  # whatever a class may ask for
        found_no = f"{cls.__name__} cannot be built from its config alone ({type(error).__name__}: {error})"
        is_said = any(is_named(path) for path, _ in settings)
        return [], [f"{found_no}, so its experts cannot be told apart"] if is_said else []
    for path, number in settings:
        larger = copy.deepcopy(config)
        set_setting(larger, path, 2 * number)
        try:
            twice = built(cls, larger)
        except Exception:  # the config refuses the number: it does not count experts, or not by itself
            continue
        found = growth(plain, twice, number)
        if not _counts_experts(plain, found):
            if is_named(path) and (names := _attributes(plain, twice, found)):
                reasons.append(
                    f"the experts of {cls.__name__} that config.{path} counts are numbered attributes ({names}), which "
                    f"do not close up when one of them goes, so none can be removed: keep them in an nn.ModuleList"
                )
            continue
        if found.odd:
            if is_named(path):
                reasons.append(
                    f"{found.odd[0]} of {cls.__name__} does not have one part for each of the {number} experts that "
                    f"config.{path} counts, so none of them can be removed"
                )
            continue
        if (lost := next((piece.name for piece in found.buffers if not is_saved(plain, piece.name)), None)) is not None:
            reasons.append(
                f"{lost} of {cls.__name__} has a part for each of the {number} experts that config.{path} counts and "
                f"is not saved with the model, so none of them can be removed"
            )
        own, reason = _divided(plain, path, found)
        blocks += own
        reasons += reason if is_named(path) else []
        if table := next((block.table for block in own if block.table), ""):
            reasons.append(
                f"{table} of {cls.__name__} holds whole numbers beside a router, which may be numbers of experts and "
                f"would name others after a removal, so none of the experts that config.{path} counts can be removed"
            )
    return blocks, reasons


def _counts_experts(plain: nn.Module, found: Growth) -> bool:
    """Whether what grows are experts, and not the sizes of some, or shared ones."""
    packed = [piece for piece in found.parameters if piece.dim == 0 and _ndim(plain, piece) > 2]
    rows = [piece for piece in found.parameters if (piece.dim, piece.width, _ndim(plain, piece)) == (0, 1, 2)]
    return bool(found.lists or packed or (rows and any(piece.width > 1 for piece in found.parameters)))


def _attributes(plain: nn.Module, twice: nn.Module, found: Growth) -> str | None:
    """A module that is added where a config counts more experts, and a router that has a row for it; None without."""
    router = next((piece.name for piece in found.parameters if piece.dim == 0 and _ndim(plain, piece) == 2), None)
    known = dict(plain.named_modules())
    added = (name for name, _ in twice.named_modules() if name not in known and re.search(r"\d$", name))
    first = next(added, None)
    return first and router and f"such as {first} in a larger one, beside the router {router}"


def _divided(plain: nn.Module, path: str, found: Growth) -> tuple[list[MoeBlock], list[str]]:
    """What grows with a setting, layer by layer and router by router."""
    experts = {_owner(piece.name) for piece in found.parameters if _ndim(plain, piece) > 2}
    names = [piece.name for piece in (*found.parameters, *found.buffers)] + [f"{name}." for name in found.lists]
    layers = dict.fromkeys(match[1] for name in names if (match := _LAYER.match(name)))
    blocks: list[MoeBlock] = []
    reasons: list[str] = []
    outside = [name for name in names if not _LAYER.match(name)]
    outer = tuple(count for count in found.counts if not _LAYER.match(f"{count[0]}."))
    for layer in layers:
        routers = [
            piece.name
            for piece in found.parameters
            if _is_in(piece.name, layer) and _ndim(plain, piece) == 2 and (piece.dim, piece.width) == (0, 1)
            if _owner(piece.name) not in experts
        ]
        for router in routers:

            def belongs(name: str, router: str = router, routers: list[str] = routers, layer: str = layer) -> bool:
                return _is_in(name, layer) and max(routers, key=lambda other: _common(name, other)) == router

            parameters = tuple(piece for piece in found.parameters if belongs(piece.name))
            lists = tuple(name for name in found.lists if belongs(f"{name}."))
            large = [f"{name}." for name in lists]
            large += [piece.name for piece in parameters if _ndim(plain, piece) > 2 or piece.width > 1]
            if not large:
                continue
            stack, _, index = layer.rpartition(".")
            blocks.append(
                MoeBlock(
                    name=_shared_path([_owner(name) for name in large]),
                    layer=(stack, int(index)),
                    config=path,
                    router=router,
                    parameters=parameters,
                    buffers=tuple(piece for piece in found.buffers if belongs(piece.name)),
                    lists=lists,
                    counts=tuple((name, key) for name, key in found.counts if belongs(f"{name}.")),
                    outer_counts=outer,
                    table=_table(plain, router, layer, {piece.name for piece in (*found.parameters, *found.buffers)}),
                )
            )
    taken = {piece.name for block in blocks for piece in (*block.parameters, *block.buffers)}
    taken |= {f"{name}." for block in blocks for name in block.lists}
    if outside or (left := [name for name in names if name not in taken]):
        name = (outside or left)[0].rstrip(".")
        return [], [
            f"{name} of {type(plain).__name__} grows with config.{path}, and belongs to no router in a layer, so no "
            f"expert can be removed"
        ]
    return blocks, reasons


def _table(plain: nn.Module, router: str, layer: str, divided: set[str]) -> str:
    """A tensor of whole numbers in a router's module, or in one around it, that has no part for each expert."""
    for holder in _path(_owner(router), layer):
        if holder == layer and holder != _owner(router):
            break
        module = plain.get_submodule(holder)
        is_router = holder == _owner(router)  # with all that is in it
        for kind in (module.named_buffers, module.named_parameters):
            for key, tensor in kind(recurse=is_router):
                whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
                if whole and tensor.numel() > 1 and f"{holder}.{key}" not in divided:
                    return f"{holder}.{key}"
    return ""


def _ndim(model: nn.Module, piece: UnitSlice) -> int:
    return model.get_parameter(piece.name).ndim


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _is_in(name: str, layer: str) -> bool:
    return f"{name}.".startswith(f"{layer}.")


def _common(a: str, b: str) -> int:
    """How many modules two names share, from the outermost one on."""
    return len(_shared_path([_owner(a), _owner(b)]).split("."))


def _shared_path(names: list[str]) -> str:
    """The innermost module around some modules."""
    shared = names[0].split(".")
    for name in names[1:]:
        other = name.split(".")
        same = [a == b for a, b in zip(shared, other, strict=False)]
        shared = shared[: same.index(False) if False in same else len(same)]
    return ".".join(shared)
