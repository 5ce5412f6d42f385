"""Sites: where in one model the units lie that can be removed as a whole, read off its weights.

A site is one attention or one feed-forward network; its units are heads (of grouped queries: groups) or neurons. What a
unit computes flows from the *producers*, whose outputs it is, into the *consumers*, whose inputs it is. Removing a unit
takes its slice from all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_prune.architectures import Heads, Stack, stacks_of
from hf_prune.errors import ArchitectureError


@dataclass(frozen=True)
class Part:
    """Where the units of a site lie in one parameter.

    Args:
        name: The parameter.
        dim: The dimension along which they lie.
        width: How many neighbours along it belong to one unit.
        offsets: Where the first unit begins; several where one matrix holds several projections.
    """

    name: str
    dim: int
    width: int
    offsets: tuple[int, ...] = (0,)

    def index(self, units: Tensor) -> Tensor:
        """Positions along :attr:`dim` that belong to units.

        Args:
            units: (n,) int64.

        Returns:
            (offsets * n * width,) int64.
        """
        inside = torch.arange(self.width, device=units.device)
        starts = torch.tensor(self.offsets, device=units.device)[:, None, None]
        return (starts + units[:, None] * self.width + inside).reshape(-1)

    def by_unit(self, tensor: Tensor, units: int) -> Tensor:
        """(units, rest): what of a tensor shaped like the parameter belongs to each unit."""
        flat = tensor.movedim(self.dim, 0).reshape(tensor.shape[self.dim], -1)
        index = self.index(torch.arange(units, device=tensor.device)).view(len(self.offsets), units, self.width)
        return flat[index].movedim(1, 0).reshape(units, -1)  # (offsets, units, width, rest) -> (units, all of it)


@dataclass(frozen=True)
class Site:
    """One attention or feed-forward network; where all layers share their heads, those of a whole stack.

    Args:
        name: The matrix that consumes what the units compute, from the base model; of several layers, the first one's.
        kind: ``"head"`` or ``"neuron"``.
        layers: The layers that it is in, as (list of layers, number).
        units: How many there are.
        producers: Weights and biases whose outputs the units are.
        consumers: Weights whose inputs they are.
        values: Of the producers those without which a head puts out zero.
        counts: Attributes of modules that grow with the number of units.
        minimum: How many units have to stay.
        config: Attributes of the model's config that can tell another number of units.
        per_unit: What one unit adds to each of these.
        size: The size of a head, and the attribute of the config that holds it; None for neurons.
    """

    name: str
    kind: str
    layers: tuple[tuple[str, int], ...]
    units: int
    producers: tuple[Part, ...]
    consumers: tuple[Part, ...]
    values: tuple[Part, ...]
    counts: tuple[tuple[str, str], ...]
    minimum: int
    config: tuple[str, ...]
    per_unit: tuple[int, ...]
    size: tuple[int, str] | None

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts."""
        return self.producers + self.consumers

    def parameters_per_unit(self, parameters: Mapping[str, Tensor]) -> int:
        """How many parameters go with one unit."""
        return sum(
            len(p.offsets) * p.width * parameters[p.name].numel() // parameters[p.name].shape[p.dim] for p in self.parts
        )


@dataclass(frozen=True)
class LayerList:
    """The layers of one stack.

    Args:
        name: The list's name in the model.
        stack: Its entry in the table.
        layers: The layers.
    """

    name: str
    stack: Stack
    layers: tuple[nn.Module, ...]


def layer_lists(model: nn.Module) -> list[LayerList]:
    """The stacks of layers that a model has.

    Raises:
        ArchitectureError: If its architecture is not registered, or its modules are not where the table says.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", "") or ""
    stacks = stacks_of(model_type, type(model).__name__)
    prefix = base_prefix(model)
    found = []
    for stack in stacks:
        layers = _get(model, prefix + stack.layers)
        if isinstance(layers, nn.ModuleList):
            found.append(LayerList(prefix + stack.layers, stack, tuple(layers)))
    if not found:
        raise ArchitectureError(
            f"{type(model).__name__} has no list of layers at {' or '.join(prefix + s.layers for s in stacks)}, where "
            f"the table of architectures expects one for {model_type!r}: register it with "
            f"hf_prune.register_architecture under another config.model_type"
        )
    return found


def base_prefix(model: nn.Module) -> str:
    """What comes before the names of modules of the base model, such as ``"bert."``."""
    base = getattr(model, "base_model", model)
    return "" if base is model else f"{model.base_model_prefix}."


def find_sites(model: nn.Module) -> list[Site]:
    """The sites of a model, layer by layer, attention first.

    Raises:
        ArchitectureError: As :func:`layer_lists`, or if sizes do not fit.
    """
    found: list[Site] = []
    shared: dict[str, list[Site]] = {}
    for layers in layer_lists(model):
        for number in range(len(layers.layers)):
            for heads in layers.stack.attentions:
                site = _heads(model, layers, number, heads)
                if not heads.shared:
                    found.append(site)
                else:
                    shared.setdefault(layers.name + heads.module, []).append(site)
                    if number == 0:
                        found.append(site)
            found.append(_neurons(model, layers, number))
    for sites in shared.values():
        found[found.index(sites[0])] = _joined(sites)
    return found


def _joined(sites: Sequence[Site]) -> Site:
    """One site of what several layers decide together."""
    if len({site.units for site in sites}) > 1:
        raise ArchitectureError(
            f"the layers of {sites[0].name} share their position biases and have {[s.units for s in sites]} heads: "
            f"expected the same number everywhere"
        )
    return replace(
        sites[0],
        layers=tuple(place for site in sites for place in site.layers),
        producers=tuple(part for site in sites for part in site.producers),
        consumers=tuple(part for site in sites for part in site.consumers),
        values=tuple(part for site in sites for part in site.values),
        counts=tuple(count for site in sites for count in site.counts),
        minimum=1,
    )


def _heads(model: nn.Module, layers: LayerList, number: int, heads: Heads) -> Site:
    attention = f"{layers.name}.{number}.{heads.module}"
    query, key, value, out = (f"{attention}.{name}" for name in (heads.query, heads.key, heads.value, heads.out))
    holder, _, attribute = f"{attention}.{heads.size}".rpartition(".")
    size = getattr(_module(model, holder), attribute)
    if query == key == value:
        total = _length(model, query, "out")
        units = total // (3 * size)
        producers = _outputs(model, query, units, 3, total)
        values = tuple(replace(part, offsets=part.offsets[2:]) for part in producers)
        queries = units
    else:
        units = _length(model, key, "out") // size
        queries = _length(model, query, "out") // size
        parts = [_outputs(model, name, units, 1, _length(model, name, "out")) for name in (query, key, value)]
        producers, values = tuple(part for found in parts for part in found), parts[2]
    if heads.bias is not None and number == 0:
        producers += (Part(f"{attention}.{heads.bias}.weight", 1, 1),)
    consumers = (_input(model, out, units),)
    counts = tuple((f"{attention}.{count}".rpartition(".")[0], count.rpartition(".")[2]) for count in heads.counts)
    per_unit = (queries // max(units, 1), 1)[: len(heads.config)]
    return Site(
        name=out.removeprefix(base_prefix(model)),
        kind="head",
        layers=((layers.name, number),),
        units=units,
        producers=producers,
        consumers=consumers,
        values=values,
        counts=tuple((module, name) for module, name in counts if hasattr(_module(model, module), name)),
        minimum=max(heads.minimum, int(layers.stack.first_heads and number == 0)),
        config=heads.config,
        per_unit=per_unit,
        size=None if heads.config_size is None else (size, heads.config_size),
    )


def _neurons(model: nn.Module, layers: LayerList, number: int) -> Site:
    neurons, layer = layers.stack.neurons, f"{layers.name}.{number}"
    ups = [name for name in (f"{layer}.{up}" for up in neurons.up) if _get(model, name) is not None]
    down = f"{layer}.{neurons.down}"
    if not ups:
        raise ArchitectureError(
            f"{layer} of {type(model).__name__} has none of {', '.join(neurons.up)}, where the table of architectures "
            f"expects its feed-forward network: register the architecture under another config.model_type"
        )
    units = _length(model, down, "in")
    parts = [_outputs(model, name, units, 1, _length(model, name, "out")) for name in ups]
    return Site(
        name=down.removeprefix(base_prefix(model)),
        kind="neuron",
        layers=((layers.name, number),),
        units=units,
        producers=tuple(part for found in parts for part in found),
        consumers=(_input(model, down, units),),
        values=(),
        counts=(),
        minimum=0 if isinstance(_module(model, down), nn.Linear) else 1,  # Conv1D cannot flatten what is empty
        config=(neurons.config,),
        per_unit=(1,),
        size=None,
    )


def _outputs(model: nn.Module, name: str, units: int, projections: int, total: int) -> tuple[Part, ...]:
    """The weight and the bias of a module whose outputs are units, evenly."""
    _check_divides(model, name, total, units * projections)
    each = total // projections
    width = each // units if units else 0
    offsets = tuple(range(0, total, each)) if each else (0,) * projections
    module = _module(model, name)
    weight = Part(f"{name}.weight", _dims(module)[0], width, offsets)
    if module._parameters.get("bias") is None:
        return (weight,)
    return weight, Part(f"{name}.bias", 0, width, offsets)


def _input(model: nn.Module, name: str, units: int) -> Part:
    total = _length(model, name, "in")
    _check_divides(model, name, total, units)
    return Part(f"{name}.weight", _dims(_module(model, name))[1], total // units if units else 0)


def _check_divides(model: nn.Module, name: str, total: int, units: int) -> None:
    if total and (not units or total % units):
        raise ArchitectureError(
            f"{name} of {type(model).__name__} has {total} features for {units} units: expected a multiple; its "
            f"entry in the table of architectures does not fit"
        )


def _length(model: nn.Module, name: str, side: str) -> int:
    module = _module(model, name)
    return module._parameters["weight"].shape[_dims(module)[side == "in"]]  # type: ignore[union-attr]


def _dims(module: nn.Module) -> tuple[int, int]:
    """The dimensions of a weight along which outputs and inputs lie."""
    from transformers.pytorch_utils import Conv1D

    return (1, 0) if isinstance(module, Conv1D) else (0, 1)


def _module(model: nn.Module, name: str) -> nn.Module:
    found = _get(model, name)
    if found is None:
        raise ArchitectureError(
            f"{type(model).__name__} has no module {name}, which the table of architectures expects: register the "
            f"architecture under another config.model_type"
        )
    return found


def _get(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
