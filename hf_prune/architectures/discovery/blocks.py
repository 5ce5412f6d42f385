"""Find the lists of layers in a model: what is repeated, and has matrices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.discovery.sample import Sample
from hf_prune.architectures.layer_list import LAYER_NUMBER

Kind = tuple[Any, ...]
# Rates of dropout, which often grow with the layer's number.
_DROPOUT = re.compile(r"training|drop_prob|drop_path\w*|p|\w*dropout\w*")


@dataclass(frozen=True)
class Blocks:
    """A list of layers.

    Args:
        name: Its name in the model.
        layers: The layers.
        is_residual: Whether each layer is run once, and gives hidden states of the shape that it takes.
    """

    name: str
    layers: tuple[nn.Module, ...]
    is_residual: bool

    def kinds(self) -> dict[int, Kind]:
        """The number of the first layer of each kind, with what makes the kind."""
        firsts: dict[Kind, int] = {}
        for number, layer in enumerate(self.layers):
            firsts.setdefault(kind_of(layer), number)
        return {number: kind for kind, number in firsts.items()}


def kind_of(layer: nn.Module) -> Kind:
    """What layers of one kind have in common: class, names and shapes of parameters, and plain attributes."""
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    return (type(layer).__qualname__, shapes, plain_attributes(layer))


def plain_attributes(layer: nn.Module) -> tuple[tuple[str, str, Any], ...]:
    """What the modules of a layer hold besides tensors: numbers, flags and words, but not the layer's own number."""
    return tuple(
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | type(None))
        and not key.startswith("_")
        and not LAYER_NUMBER.fullmatch(key)
        and not _DROPOUT.fullmatch(key)
    )


def find_blocks(sample: Sample) -> list[Blocks]:
    """The lists of layers of a small model, as far as a forward pass runs them; outermost first.

    A list whose members change the shape of hidden states (the stages of a pyramid) is passed over for the lists in it.
    """
    lists = {
        name: tuple(module)
        for name, module in sample.model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and _all_have_matrices(module)
    }
    calls = _shapes_of_calls(sample, {f"{name}.{i}": m for name, ms in lists.items() for i, m in enumerate(ms)})
    found: list[Blocks] = []
    for name, layers in lists.items():
        if any(name.startswith(f"{blocks.name}.") for blocks in found):
            continue
        runs = [calls[f"{name}.{i}"] for i in range(len(layers))]
        is_residual = all(len(run) == 1 and run[0] for run in runs)
        holds_lists = any(other.startswith(f"{name}.") for other in lists)
        if any(runs) and (is_residual or not holds_lists):
            found.append(Blocks(name, layers, is_residual))
    return found


def first_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer takes as hidden states."""
    return args[0] if args else kwargs.get("hidden_states")


def _all_have_matrices(layers: nn.Module) -> bool:
    return all(any(p.dim() >= 2 for p in layer.parameters()) for layer in layers.children())


def _shapes_of_calls(sample: Sample, modules: dict[str, nn.Module]) -> dict[str, list[bool]]:
    """For each call of each module in a forward pass, whether it keeps the shape of its hidden states."""
    calls: dict[str, list[bool]] = {name: [] for name in modules}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            taken, given = first_hidden(args, kwargs), output[0] if isinstance(output, tuple) and output else output
            calls[name].append(isinstance(taken, Tensor) and isinstance(given, Tensor) and taken.shape == given.shape)

        return record

    handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
    try:
        with torch.no_grad():
            sample.outputs()
    finally:
        for handle in handles:
            handle.remove()
    return calls
