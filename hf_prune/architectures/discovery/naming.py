"""Say what was found in the small model in names and attributes, so that it can be found in a model of any size."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from torch import nn

from hf_prune.architectures.base import Piece, Units
from hf_prune.architectures.discovery.flow import BATCH_NORMS
from hf_prune.architectures.discovery.partition import FoundSlices, FoundUnits
from hf_prune.architectures.layer_list import inside
from hf_prune.architectures.modules import base_prefix

_SIZE = re.compile(r"\w*(head_dim|head_size|d_kv|d_head|dim_head|key_value_proj_dim|head_features|dim_per_head)\w*")
_SIZE_OR_WIDTH = re.compile(r"\w*(dim|size|channels|features|d_k|d_v)\w*")
_NUMBER = re.compile(r"\w*(heads?|groups?|n_head\w*|h)")
_QUERIES_PER_KEY = re.compile(r"\w*(key_value_groups|kv_groups|n_rep|queries_per|per_group|kv_repeat)\w*")
_WIDTH = re.compile(r"\w*(size|dim|width|channels|features|embed|d_model|hidden|inner|total|split|ffn|intermediate)\w*")
_MOST_ENTRIES = 8  # of a list of sizes, such as those of a split
_MOST_UNNAMED = 4  # attributes of which every combination is tried
_HIDDEN = re.compile(r"hidden_size|embed_dim|d_model|dim|embedding_dim|hidden_dim|in_features|out_features|n_embd")


def outside_names(layer: str, found: FoundUnits) -> set[str]:
    """The producers that lie outside of a layer, such as a table of position biases that all layers share."""
    return {piece.name for piece in found.producers + found.buffers if not piece.name.startswith(inside(layer, ""))}


def named_units(model: nn.Module, layer: str, found: FoundUnits, outside: Collection[str]) -> Iterator[Units]:
    """Ways to say what was found, the most careful first; trials tell which is right.

    They differ in the attributes of modules that shrink with the units: none, numbers of heads, widths.

    Args:
        model: The small model.
        layer: The name of the layer.
        found: Its units.
        outside: Names of parameters that lie outside of some layer that uses them.
    """
    head = found.width > 1

    prefix = base_prefix(model)

    def piece(slices: FoundSlices) -> Piece:
        is_outside = slices.name in outside
        name = slices.name.removeprefix(prefix) if is_outside else slices.name.removeprefix(inside(layer, ""))
        wide = tuple(width == found.width for width in slices.widths)
        return Piece(name, slices.dim, wide, is_outside, slices.fixed)

    units = Units(
        kind=found.kind,
        producers=tuple(map(piece, found.producers)),
        consumers=tuple(map(piece, found.consumers)),
        buffers=tuple(map(piece, found.buffers)),
        shared=any(p.name in outside for p in found.producers + found.buffers),
    )
    of_torch = _attributes_of_torch(model, layer, found)
    attributes = _attributes(model, layer, [p.name for p in found.producers + found.consumers])
    for sized in _sizes(attributes, found, units) if head else [units]:
        for counts in _counts(attributes, found):
            if sized.number is None or sized.number in counts:
                yield replace(sized, counts=counts + of_torch)


def _sizes(attributes: dict[str, int], found: FoundUnits, units: Units) -> list[Units]:
    """Ways to tell the number of units: by the size of one, or by an attribute with the number."""
    named = list(zip(units.producers + units.consumers, found.producers + found.consumers, strict=True))
    named = [(p, s) for p, s in named if len(set(s.widths)) == 1 and not p.outside and p.fixed is None]
    ways = []
    attributes = {name: value for name, value in attributes.items() if not name.endswith("]")}
    for pattern in (_SIZE, _SIZE_OR_WIDTH):
        for piece, slices in sorted(named, key=lambda pair: pair[1].widths[0]):
            for name, value in attributes.items():
                word = name.rpartition(".")[2]
                if value == slices.widths[0] > 1 and pattern.fullmatch(word) and not is_in_config(name):
                    ways.append(replace(units, size=name, sized=piece.name))
    narrowest = min(width for slices in found.producers + found.consumers for width in slices.widths)
    named_sizes = (
        name
        for name, value in attributes.items()
        if value == narrowest > 1 and _SIZE.fullmatch(name.rpartition(".")[2]) and not is_in_config(name)
    )
    head_size = next(named_sizes, None)
    numbers = [
        replace(units, number=name, size=head_size)
        for name, value in attributes.items()
        if value == found.units and _is_number(name.rpartition(".")[2]) and not is_in_config(name)
    ]
    if not ways and not numbers:  # code that reads the config while it runs
        ways = [
            replace(units, size=name, sized=piece.name)
            for piece, slices in sorted(named, key=lambda pair: pair[1].widths[0])
            for name, value in attributes.items()
            if value == slices.widths[0] > 1 and is_in_config(name) and _SIZE.fullmatch(name.rpartition(".")[2])
        ]
    sizes = [way for way in ways if _SIZE.fullmatch(str(way.size).rpartition(".")[2])]
    unnamed = [  # by its value alone, in code with names of its own
        replace(units, number=name)
        for name, value in attributes.items()
        if value == found.units and not is_in_config(name) and not _NUMBER.fullmatch(name.rpartition(".")[2])
    ]
    return sizes[:1] + numbers[:1] + [way for way in ways if way not in sizes][:1] + unnamed[:1]


def _is_number(word: str) -> bool:
    """Whether an attribute is named like a number of heads, and not like that of queries which share keys."""
    return bool(_NUMBER.fullmatch(word)) and not _QUERIES_PER_KEY.fullmatch(word)


def _counts(attributes: dict[str, int], found: FoundUnits) -> list[tuple[str, ...]]:
    """Attributes that may have to shrink with the units, by names and values: several guesses."""
    pieces = found.producers + found.consumers
    totals = {width * found.units for piece in pieces for width in piece.widths}
    totals |= {sum(piece.widths) * found.units for piece in pieces}
    narrowest = min(width for piece in pieces for width in piece.widths)
    heads = {found.units, found.units * found.width // narrowest}
    numbers, repeats, widths = [], [], []
    for name, value in attributes.items():
        word = name.rpartition(".")[2].partition("[")[0]  # of an entry, the name of the list
        if _QUERIES_PER_KEY.fullmatch(word):
            repeats += [name] if value == found.units else []
        elif found.width > 1 and value in heads and _NUMBER.fullmatch(word):
            numbers.append(name)
        elif value in totals and _WIDTH.fullmatch(word):
            widths.append(name)
    inner = [name for name in widths if not _HIDDEN.fullmatch(name.rpartition(".")[2])]
    guesses = [numbers, numbers + inner, numbers + widths]
    guesses += [guess + repeats for guess in guesses] if repeats else []
    # Code that reads the config while it runs needs other numbers there, and then in all layers.
    own = [[name for name in guess if not is_in_config(name)] for guess in guesses]
    guesses = own + [guess for guess in guesses if any(map(is_in_config, guess))]
    if found.width > 1:  # by their values alone, in code with names of its own
        ratios = {found.width // width for piece in pieces for width in piece.widths}
        ratios |= {width for piece in pieces for width in piece.widths if width < found.width}  # a number for each head
        heads |= {found.units * ratio for ratio in ratios}
        entries = [name for name in inner if name.endswith("]")]  # sizes of a split, all of which have to follow
        same = [name for name, value in attributes.items() if value in heads and not is_in_config(name)]
        same = [name for name in same if not name.endswith("]")]
        sizes = range(min(len(same), _MOST_UNNAMED), 0, -1)
        tries = [[*guess] for size in sizes for guess in itertools.combinations(same[:_MOST_UNNAMED], size)]
        guesses += tries + ([[*guess, *entries] for guess in tries] if entries else [])
    return list(dict.fromkeys(tuple(guess) for guess in guesses))


def _attributes_of_torch(model: nn.Module, layer: str, found: FoundUnits) -> tuple[str, ...]:
    """What convolutions and norms say of their own channels; linear modules are corrected with their weights."""
    names: dict[str, None] = {}
    for piece in found.producers + found.consumers:
        module_name = piece.name.rpartition(".")[0]
        module = model.get_submodule(module_name)
        keys: tuple[str, ...] = ()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            own = ("out_channels", "in_channels", "groups") if module.groups > 1 else ("out_channels",)
            keys = ("in_channels",) if piece in found.consumers else own
        elif isinstance(module, BATCH_NORMS):
            keys = ("num_features",)
        names |= dict.fromkeys(inside(module_name, key).removeprefix(inside(layer, "")) for key in keys)
    return tuple(names)


def _attributes(model: nn.Module, layer: str, names: Sequence[str]) -> dict[str, int]:
    """Whole numbers that modules around some parameters hold, by name relative to the layer."""
    own = inside(layer, "")
    paths = [name.split(".")[:-1] for name in names if name.startswith(own)]
    depth = next((i for i, words in enumerate(zip(*paths, strict=False)) if len(set(words)) > 1), min(map(len, paths)))
    top = ".".join(paths[0][:depth])
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        is_around = name == layer or (inside(top, "").startswith(inside(name, "")) and name.startswith(own))
        if not is_around and not (top and name.startswith(f"{top}.")):
            continue
        if type(module).__module__.startswith("torch.nn"):
            continue
        for key, value in vars(module).items():
            entries = value if type(value) in (list, tuple) and len(value) <= _MOST_ENTRIES else ()
            sizes = {key: value} | ({f"{key}[{i}]": entry for i, entry in enumerate(entries)} if entries else {})
            found |= {inside(name, k).removeprefix(own): size for k, size in sizes.items() if _is_size(k, size)}
        for key, value in vars(getattr(module, "config", object)).items() if name and name.startswith(own) else ():
            if _is_size(key, value) and not _HIDDEN.fullmatch(key):
                found[inside(name, f"config.{key}").removeprefix(own)] = value
    return found


def _is_size(key: str, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and not key.startswith("_")


def is_in_config(name: str) -> bool:
    """Whether an attribute is one of a config, by its name relative to a layer."""
    return name.rpartition(".")[0].endswith("config")
