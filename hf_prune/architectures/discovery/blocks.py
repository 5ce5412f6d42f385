"""Find the lists of layers in a model: what is repeated, and has matrices."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.discovery.sample import Sample
from hf_prune.architectures.layer_list import Place, is_layer_number, number_places

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
        is_called: Whether layers are run as a whole; where they are lists themselves, only what is in them is.
    """

    name: str
    layers: tuple[nn.Module, ...]
    is_residual: bool
    is_called: bool = True

    def kinds(self) -> dict[int, Kind]:
        """The number of the first layer of each kind, with what makes the kind."""
        firsts: dict[Kind, int] = {}
        numbers = number_places(self.layers)
        for number, layer in enumerate(self.layers):
            firsts.setdefault(kind_of(layer, numbers), number)
        return {number: kind for kind, number in firsts.items()}


def kind_of(layer: nn.Module, numbers: Collection[Place]) -> Kind:
    """What layers of one kind have in common: class, names and shapes of parameters, and plain attributes.

    Args:
        layer: A layer of a list.
        numbers: Where the layers of the list keep their own number.
    """
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    return (type(layer).__qualname__, shapes, plain_attributes(layer, numbers))


def plain_attributes(layer: nn.Module, numbers: Collection[Place] = ()) -> tuple[tuple[str, str, Any], ...]:
    """What the modules of a layer hold besides tensors: numbers, flags and words, but not the layer's own number."""
    return tuple(
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | type(None))
        and not key.startswith("_")
        and not is_layer_number((name, key), numbers)
        and not _DROPOUT.fullmatch(key)
    )


def find_blocks(sample: Sample) -> list[Blocks]:
    """The lists of layers of a small model, as far as a forward pass runs them; outermost first.

    A list whose members change the shape of hidden states (the stages of a pyramid) is passed over for the lists in it.
    """
    lists = {
        name: tuple(module)
        for name, module in sample.model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and _are_layers(module)
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
        elif not any(runs) and all(isinstance(layer, nn.ModuleList | nn.ModuleDict) for layer in layers):
            found.append(Blocks(name, layers, is_residual=False, is_called=False))
    return found


def idle_parts(sample: Sample) -> dict[str, str]:
    """Why nothing was found in parts of a small model that its inputs do not reach, such as a tower of images.

    Returns:
        A sentence by the name of each such part, the outermost ones.
    """
    from transformers import PreTrainedModel

    called: set[int] = set()
    hooks = [m.register_forward_pre_hook(lambda module, _: called.add(id(module))) for m in sample.model.modules()]
    try:
        sample.outputs()
    finally:
        for hook in hooks:
            hook.remove()
    idle: list[str] = []
    for name, part in sample.model.named_modules():
        modules = list(part.modules())
        has_layers = any(isinstance(module, nn.ModuleList) for module in modules)
        is_part = name and has_layers and (isinstance(part, PreTrainedModel) or "." not in name)
        is_inside = any(name.startswith(f"{other}.") for other in idle)
        if is_part and not is_inside and not any(id(module) in called for module in modules):
            idle.append(name)
    inputs = ", ".join(key for key, value in sample.inputs.items() if isinstance(value, Tensor))
    reason = f"nothing in it could be proven: a small model was run on {inputs} alone, for want of inputs that reach it"
    return dict.fromkeys(idle, reason)


def first_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer takes as hidden states."""
    return args[0] if args else kwargs.get("hidden_states")


def _are_layers(layers: nn.Module) -> bool:
    """Whether all have matrices; in a list of nothing but matrices, units lie between one and the next."""
    members = list(layers.children())
    have_matrices = all(any(p.dim() >= 2 for p in layer.parameters()) for layer in members)
    return have_matrices and any(matrix_dims(layer) is None for layer in members)


def matrix_dims(module: nn.Module) -> tuple[int, int] | None:
    """The dimensions of a module's weight along which outputs and inputs lie; None if it is not a matrix."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return 0, 1
    if isinstance(module, Conv1D):
        return 1, 0
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return 0, 1
    return None


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
