"""See from gradients which rows of which parameters reach which inputs of which matrix.

Within one layer, the derivative of each input of a matrix with respect to every parameter is either zero by
construction, or not. Derivatives of heads with respect to the rows of another head's projections are zero; those of a
norm over all features are not. This tells any layout of projections apart, whatever its modules are called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache

from hf_prune.architectures.discovery.blocks import Blocks, first_hidden, matrix_dims
from hf_prune.architectures.discovery.sample import FAILURES, Sample
from hf_prune.architectures.expert_neurons import expert_neuron_groups

_MOST_CALLS = 4  # of one matrix in a forward pass that are looked at
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # no derivatives by their running statistics
_BATCH = 64  # derivatives computed at once
_MOST_TOKENS = 24
_LARGEST_SHARED = 4096  # entries of a table outside of the layers, such as one of position biases
Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a layer


@dataclass(frozen=True)
class Flow:
    """What reaches the inputs of one matrix.

    Args:
        consumer: The name of the module with the matrix.
        reaches: By name of a parameter or buffer, for each of its dimensions, (inputs, length) bool: whether anything
            at a position along that dimension reaches an input.
    """

    consumer: str
    reaches: Mapping[str, Sequence[Tensor]]


def trace_flows(sample: Sample, blocks: Sequence[Blocks]) -> dict[str, list[Flow]]:
    """What reaches each matrix in the first layer of each kind, by the name of the layer.

    Layers are run by themselves. What is in no layer, or in one that is not run as a whole, is looked at in a forward
    pass of the whole model; the name of all that is in no layer is empty.
    """
    layers = {f"{b.name}.{number}": b.layers[number] for b in blocks if b.is_called for number in b.kinds()}
    leaves = _leaves(sample.model)
    states = [tensor.requires_grad for tensor in leaves.values()]
    taken = _matrices_by_place(sample.model, blocks)
    try:
        for tensor in leaves.values():
            tensor.requires_grad_(True)
        with torch.enable_grad(), _NoDeadNeurons():
            calls = _first_calls(
                sample, layers, {name: inputs for place in taken.values() for name, inputs in place.items()}
            )
            flows = {name: _flows_in(sample.model, name, call, leaves) for name, call in calls.items()}
            for place, inputs in taken.items():
                own = _leaves_of(place, leaves, blocks)
                if not place:  # what reads pixels or samples is small, and all else rests on it
                    own = {n: leaf for n, leaf in own.items() if not _is_first(sample.model, inputs, n)}
                flows[place] = _flows_of(sample.model, inputs, own)
            return flows
    finally:
        for tensor, state in zip(leaves.values(), states, strict=True):
            tensor.requires_grad_(state)


def _matrices_by_place(model: nn.Module, blocks: Sequence[Blocks]) -> dict[str, dict[str, list[Tensor]]]:
    """The matrices that only the whole model runs, with room for their inputs, by the name of the layer, or none."""
    places: dict[str, dict[str, list[Tensor]]] = {"": {}}
    places |= {f"{b.name}.{number}": {} for b in blocks if not b.is_called for number in b.kinds()}
    seen: set[Any] = set()
    for name, module in model.named_modules():
        if not _may_consume(name, module):
            continue
        place = next((place for place in places if place and name.startswith(f"{place}.")), "")
        if not place and any(name.startswith(f"{b.name}.") for b in blocks):
            continue  # in a layer that is run by itself, or is like one that is looked at
        kind = (re.sub(r"\d+", "*", name), tuple(p.shape for p in module.parameters()))
        if place or kind not in seen:
            places[place][name] = []
        seen.add(kind)
    return {place: inputs for place, inputs in places.items() if inputs}


def _leaves_of(place: str, leaves: Mapping[str, Tensor], blocks: Sequence[Blocks]) -> dict[str, Tensor]:
    """What may hold units of a place: all that is in it, or in no layer."""
    if place:
        return {n: leaf for n, leaf in leaves.items() if n.startswith(f"{place}.")}
    return {n: leaf for n, leaf in leaves.items() if not any(n.startswith(f"{b.name}.") for b in blocks)}


def _is_first(model: nn.Module, inputs: Mapping[str, Sequence[Tensor]], name: str) -> bool:
    """Whether a parameter is of a convolution of which no input was recorded, since none comes from a parameter."""
    holder = name.rpartition(".")[0]
    is_convolution = isinstance(model.get_submodule(holder), nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return is_convolution and not inputs.get(holder, ())


def _first_calls(sample: Sample, layers: Mapping[str, nn.Module], taken: Mapping[str, list[Tensor]]) -> dict[str, Call]:
    """What each layer is called with first, in a forward pass of the whole model.

    Args:
        sample: The small model.
        layers: The layers by name.
        taken: Matrices by name, to which their inputs are added.
    """
    calls: dict[str, Call] = {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, (args, kwargs))

        return record

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    handles += [
        sample.model.get_submodule(name).register_forward_pre_hook(_recorder(inputs)) for name, inputs in taken.items()
    ]
    try:
        sample.model(**dict(sample.inputs))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _flows_in(model: nn.Module, layer: str, call: Call, leaves: Mapping[str, Tensor]) -> list[Flow]:
    """What reaches each matrix in a layer that is called by itself: with few tokens if it can do with few."""
    module = model.get_submodule(layer)
    # Which are found in another way, as many as the model has.
    in_experts = {p.name.rpartition(".")[0] for group in expert_neuron_groups(model) for p in group.consumers}
    for shorten in (True, False):
        args, kwargs = _own_inputs(call, shorten)
        taken: dict[str, list[Tensor]] = {}
        handles = [
            matrix.register_forward_pre_hook(_recorder(taken.setdefault(name, [])))
            for name, matrix in module.named_modules(prefix=layer)
            if _may_consume(name, matrix) and name not in in_experts
        ]
        try:
            module(*args, **kwargs)
        except FAILURES:
            continue  # with all tokens; a layer that does not run by itself has no flows
        else:
            near = {
                name: leaf
                for name, leaf in leaves.items()
                if name.startswith(f"{layer}.") or leaf.numel() <= _LARGEST_SHARED
            }
            return _flows_of(model, taken, near)
        finally:
            for handle in handles:
                handle.remove()
    return []


def _flows_of(model: nn.Module, taken: Mapping[str, list[Tensor]], leaves: Mapping[str, Tensor]) -> list[Flow]:
    """What reaches some matrices, of which the inputs are given."""
    flows = [_flow(name, model, inputs, leaves) for name, inputs in taken.items()]
    return [flow for flow in flows if flow is not None]


def _own_inputs(call: Call, shorten: bool) -> Call:
    """What a layer was called with, so that derivatives end at its hidden states and those of an encoder.

    Tables of positions, which the layers of some models share, are passed in other shapes and stay connected.

    Args:
        call: Arguments of the layer.
        shorten: Keep only the first tokens, since derivatives of attention take quadratic time.
    """
    args, kwargs = call
    hidden = first_hidden(args, kwargs)
    tokens = hidden.shape[1] if isinstance(hidden, Tensor) and hidden.dim() == 3 else 0

    def own(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(map(own, value))
        if isinstance(value, Cache):  # it holds the tokens of the call that was watched
            return None
        if not isinstance(value, Tensor):
            return value
        if value is hidden or value.dim() == 3:
            value = value.detach()
        for dim in range(value.dim()) if shorten and tokens > _MOST_TOKENS else ():
            value = value.narrow(dim, 0, _MOST_TOKENS) if value.shape[dim] == tokens else value
        return value

    return tuple(map(own, args)), {key: own(value) for key, value in kwargs.items()}


class _NoDeadNeurons(TorchFunctionMode):
    """Makes rectifiers leak, so that no derivative is zero just because of the weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("relu", "relu_", "relu6"):
            return nn.functional.leaky_relu(args[0] if args else kwargs["input"], 0.1)
        return func(*args, **(kwargs or {}))


def _may_consume(name: str, module: nn.Module) -> bool:
    """Whether a module may read units; experts have a kind of unit of their own."""
    return matrix_dims(module) is not None and getattr(module, "groups", 1) == 1 and "experts" not in name.split(".")


def _recorder(inputs: list[Tensor]) -> Any:
    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].requires_grad and len(inputs) < _MOST_CALLS:
            inputs.append(args[0])

    return record


def _leaves(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of real numbers, by name."""
    norms = {name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)}
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.rpartition(".")[0] not in norms]
    tensors = [*model.named_parameters(), *buffers]
    return {name: tensor for name, tensor in tensors if tensor.is_floating_point() and tensor.is_leaf and tensor.dim()}


def _flow(consumer: str, model: nn.Module, inputs: Sequence[Tensor], leaves: Mapping[str, Tensor]) -> Flow | None:
    """What reaches one matrix; None if no other parameter of the layer does."""
    is_convolution = isinstance(model.get_submodule(consumer), nn.Conv1d | nn.Conv2d | nn.Conv3d)
    generator = torch.Generator().manual_seed(0)
    features: Tensor | None = None
    for tensor in inputs:  # (batch, ..., features), of a convolution (batch, features, ...)
        last = tensor.movedim(1, -1) if is_convolution else tensor
        weights = torch.rand(last.shape, generator=generator) + 0.5
        total = (last * weights.to(last.dtype)).reshape(-1, last.shape[-1]).sum(0)  # (features,)
        features = total if features is None else features + total
    if features is None:
        return None
    names = [name for name in leaves if not name.startswith(f"{consumer}.")]
    if not names:
        return None
    # Most of what lies before a matrix reaches all of its inputs. Two inputs tell, and nothing need be derived by it.
    for one in (features[0], features[-1]):
        tensors = [leaves[name] for name in names]
        gradients = torch.autograd.grad(one, tensors, retain_graph=True, allow_unused=True)
        names = [name for name, gradient in zip(names, gradients, strict=True) if _is_partly_used(gradient)]
        if not any(leaves[name].dim() >= 2 for name in names):
            return None
    return Flow(consumer, _reaches(features, {name: leaves[name] for name in names}))


def _is_partly_used(gradient: Tensor | None) -> bool:
    """Whether a derivative is zero at some positions of a dimension, and not at others."""
    if gradient is None:
        return False
    used = gradient != 0
    by_dim = [used.movedim(dim, 0).flatten(1).any(1) if used.dim() > 1 else used for dim in range(used.dim())]
    return any(bool(positions.any()) and not bool(positions.all()) for positions in by_dim)


def _reaches(features: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """For each leaf and each of its dimensions, (features, length) bool."""
    rows: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(leaf.dim())] for name, leaf in leaves.items()}
    identity = torch.eye(len(features), dtype=features.dtype)
    for chunk in identity.split(_BATCH):
        for (name, leaf), gradient in zip(leaves.items(), _derivatives(features, leaves, chunk), strict=True):
            used = gradient != 0  # (chunk, *leaf.shape)
            for dim in range(leaf.dim()):
                rows[name][dim].append(used.movedim(dim + 1, 1).flatten(2).any(2) if leaf.dim() > 1 else used)
    return {name: [torch.cat(parts) for parts in by_dim] for name, by_dim in rows.items()}


def _derivatives(features: Tensor, leaves: Mapping[str, Tensor], directions: Tensor) -> list[Tensor]:
    """(directions, *leaf.shape) for each leaf."""
    tensors = list(leaves.values())
    try:
        found = torch.autograd.grad(
            features, tensors, directions, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError:  # an operation that cannot be batched
        each = [
            torch.autograd.grad(features, tensors, direction, retain_graph=True, materialize_grads=True)
            for direction in directions
        ]
        return [torch.stack(gradients) for gradients in zip(*each, strict=True)]
    return [
        torch.zeros(len(directions), *tensor.shape) if gradient is None else gradient
        for tensor, gradient in zip(tensors, found, strict=True)
    ]
