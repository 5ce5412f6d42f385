"""Units in numbered modules of which a small model has fewer, such as ``expert4`` where it ends with ``expert3``.

A number in the config counts these modules, and the small model of discovery has a lower one: what was proven of the
first modules is then said of the others that are alike.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from hf_prune.architectures.base import Piece, Units
from hf_prune.architectures.growth import built
from hf_prune.architectures.layer_list import LayerList
from hf_prune.architectures.memory import remembered
from hf_prune.architectures.modules import find_module
from hf_prune.architectures.small_configs import small_config

_NUMBERED = re.compile(r"(.*?)(\d+)(\D*)")
_SMALL_NAMES: dict[tuple[Any, str], frozenset[str]] = {}


def with_siblings(model: nn.Module, layers: LayerList) -> LayerList:
    """A stack whose units were found, with those in further modules that are numbered and built like theirs.

    Args:
        model: The model.
        layers: A list of layers in it.
    """
    units = list(layers.stack.units)
    taken = {_place(found) for found in units}
    for found in layers.stack.units:
        for old, new in _siblings(model, layers, _place(found)):
            sibling = _moved(found, old, new)
            if _place(sibling) not in taken and f"{new}." not in _names_in_small(model, layers):
                taken.add(_place(sibling))
                units.append(sibling)
    return replace(layers, stack=replace(layers.stack, units=tuple(units)))


def _place(units: Units) -> str:
    """The module around all of some units, relative to the layer, with a dot at the end; empty for the layer itself."""
    pieces = (*units.producers, *units.consumers, *units.buffers)
    if any(piece.outside for piece in pieces):
        return ""
    same = itertools.takewhile(
        lambda words: len(set(words)) == 1, zip(*(p.name.split(".") for p in pieces), strict=False)
    )
    return "".join(f"{words[0]}." for words in same)


def _siblings(model: nn.Module, layers: LayerList, place: str) -> Iterator[tuple[str, str]]:
    """Modules of the layers that differ from one by a number in its name, and in nothing else; with that one."""
    words = place.rstrip(".").split(".")
    for number, word in enumerate(words):
        if (match := _NUMBERED.fullmatch(word)) is None:
            continue
        stem, _, end = match.groups()
        pattern = re.compile(f"{re.escape(stem)}\\d+{re.escape(end)}")
        holder, old = ".".join(words[:number]), ".".join(words[: number + 1])
        for layer in layers.layer_names():
            around, example = find_module(model, f"{layer}.{holder}".rstrip(".")), find_module(model, f"{layer}.{old}")
            for key, module in around.named_children() if around is not None and example is not None else ():
                if key != word and pattern.fullmatch(key) and _form(module) == _form(example):
                    yield old, f"{holder}.{key}".lstrip(".")


def _form(module: nn.Module | None) -> Any:
    """The class of a module, and the names and shapes of its parameters."""
    return module and (type(module), [(name, parameter.shape) for name, parameter in module.named_parameters()])


def _moved(units: Units, old: str, new: str) -> Units:
    """Units of a module in another one."""

    def moved(name: str) -> str:
        return new + name.removeprefix(old) if f"{name}.".startswith(f"{old}.") else name

    def pieces(found: tuple[Piece, ...]) -> tuple[Piece, ...]:
        return tuple(replace(piece, name=moved(piece.name)) for piece in found)

    return replace(
        units,
        producers=pieces(units.producers),
        consumers=pieces(units.consumers),
        buffers=pieces(units.buffers),
        size=units.size and moved(units.size),
        sized=units.sized and moved(units.sized),
        number=units.number and moved(units.number),
        counts=tuple(map(moved, units.counts)),
        values=tuple(map(moved, units.values)),
    )


def _names_in_small(model: Any, layers: LayerList) -> frozenset[str]:
    """The modules in the layers of the small model, relative to them, each with a dot at its end.

    What was found in its own modules is all that holds of them.
    """
    model_class = next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("hf_prune."))
    text = model.config.to_json_string(use_diff=False)
    inside = re.compile(re.escape(layers.name) + r"\.\d+\.(.*)")

    def names() -> frozenset[str]:
        small = built(model_class, small_config(model.config))
        return frozenset(f"{match[1]}." for name, _ in small.named_modules() if (match := inside.fullmatch(name)))

    return remembered(_SMALL_NAMES, (model_class, f"{layers.name} {text}"), names)
