"""Compare two models of one class, of which one has twice as many of something: what is twice as large?"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.unit_groups import UnitSlice, numbered


@dataclass
class Growth:
    """What is twice as large in one model as in another.

    Args:
        parameters: Parameters, with the dimension and the width of each of the things.
        buffers: The same for buffers.
        lists: Lists and dicts that hold a module for each of the things.
        counts: Attributes of modules, as (module, attribute).
        odd: Names of parameters, buffers and lists that grow in another way.
    """

    parameters: list[UnitSlice] = field(default_factory=list)
    buffers: list[UnitSlice] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    counts: list[tuple[str, str]] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)


def built(cls: Any, config: Any) -> nn.Module:
    """A model without weights, on the meta device; random numbers are drawn from elsewhere."""
    from transformers.initialization import no_init_weights

    with torch.random.fork_rng(devices=[]), torch.device("meta"), no_init_weights():
        model: nn.Module = cls(copy.deepcopy(config))
    return model


def growth(plain: nn.Module, twice: nn.Module, number: int) -> Growth:
    """Compare two models.

    Args:
        plain: A model.
        twice: One with twice as many of something.
        number: How many of them the first one has.
    """
    found = Growth()
    for slices, kind in ((found.parameters, "parameters"), (found.buffers, "buffers")):
        larger = dict(getattr(twice, f"named_{kind}")())
        for name, tensor in getattr(plain, f"named_{kind}")():
            piece = _slice(name, tensor, larger.get(name, tensor), number)
            if piece is None:
                found.odd.append(name)
            elif piece.width:
                slices.append(piece)
    after = dict(twice.named_modules())
    for name, module in plain.named_modules():
        if name not in after:
            continue
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and len(after[name]) != len(module):
            counted = len(numbered(module)), len(numbered(after[name]))
            (found.lists if counted == (number, 2 * number) else found.odd).append(name)
        for key, value in vars(module).items():
            sized = isinstance(module, nn.Linear) and key in ("in_features", "out_features")  # follow from the weight
            if isinstance(value, int) and not isinstance(value, bool) and value and not sized:
                if vars(after[name]).get(key) == 2 * value:
                    found.counts.append((name, key))
    return found


def _slice(name: str, tensor: Tensor, larger: Tensor, number: int) -> UnitSlice | None:
    """The part of each thing in a tensor, of width 0 if the tensor does not grow; None if it grows in another way."""
    if tensor.shape == larger.shape:
        return UnitSlice(name, 0, 0)
    if tensor.ndim != larger.ndim:
        return None
    dims = [dim for dim, (a, b) in enumerate(zip(tensor.shape, larger.shape, strict=True)) if a != b]
    size = tensor.shape[dims[0]]
    if len(dims) > 1 or larger.shape[dims[0]] != 2 * size or size % number:
        return None
    return UnitSlice(name, dims[0], size // number)
