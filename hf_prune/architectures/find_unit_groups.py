"""Sites: where in one model the units lie that can be removed as a whole, read off its weights.

A site is one attention, one feed-forward network or the inside of one convolutional block; its units are heads (of
grouped queries: groups), neurons or channels. What a unit computes flows from the *producers*, whose outputs it is,
into the *consumers*, whose inputs it is. Removing a unit takes its slice from all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from hf_prune.architectures.base import Channels, Heads, Stack, architecture_of, list_architectures
from hf_prune.architectures.channels import channel_groups
from hf_prune.architectures.unit_groups import UnitGroup, UnitSlice, plain_weights
from hf_prune.errors import ArchitectureError
from hf_prune.utils.number_formats import refuse_quantized
from hf_prune.utils.torch_masks import refuse_torch_masks
from hf_prune.utils.wrapping import adapters


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
        ArchitectureError: If its architecture is not registered, or its modules are not where the table says, or carry
            adapters.
        PlanError: If it is quantized, or torch.nn.utils.prune holds masks.
    """
    refuse_quantized(model)
    refuse_torch_masks(model)
    for name in adapters(model).values():
        raise ArchitectureError(
            f"{name or type(model).__name__} carries adapters, which would go on writing into what is taken out: "
            f"expected a plain {type(model).__name__}; merge them first, with hf_prune.merge_lora or "
            f"merge_and_unload(), or prune before get_peft_model()"
        )
    stacks, prefix = [entry for entry in _entries(model) if isinstance(entry, Stack)], base_prefix(model)
    found = []
    for stack in stacks:
        layers = _get(model, prefix + stack.layers)
        if isinstance(layers, nn.ModuleList):
            found.append(LayerList(prefix + stack.layers, stack, tuple(layers)))
    if stacks and not found:
        raise ArchitectureError(
            f"{type(model).__name__} has no list of layers at {' or '.join(prefix + s.layers for s in stacks)}, where "
            f"the table of architectures expects one for {_model_type(model)!r}: register it with "
            f"hf_prune.register_architecture under another config.model_type"
        )
    return found


def _entries(model: nn.Module) -> tuple[Stack | Channels, ...]:
    return architecture_of(_model_type(model), type(model).__name__)


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", "") or ""


def base_prefix(model: nn.Module) -> str:
    """What comes before the names of modules of the base model, such as ``"bert."``."""
    base = getattr(model, "base_model", model)
    return "" if base is model else f"{model.base_model_prefix}."


def find_unit_groups(model: nn.Module) -> list[UnitGroup]:
    """The sites of a model, layer by layer, attention first; of a convolutional model, block by block.

    Raises:
        ArchitectureError: As :func:`layer_lists`, or if sizes do not fit.
    """
    found: list[UnitGroup] = []
    shared: dict[str, list[UnitGroup]] = {}
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
    return found + channel_groups(model, [e for e in _entries(model) if isinstance(e, Channels)], base_prefix(model))


def find_channel_groups(model: nn.Module) -> list[UnitGroup]:
    """Where a model has channels that can be taken out: nowhere if its architecture is not registered."""
    if _model_type(model) not in list_architectures():
        return []
    return [site for site in find_unit_groups(model) if site.kind == "channel"]


def _joined(sites: Sequence[UnitGroup]) -> UnitGroup:
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


def _heads(model: nn.Module, layers: LayerList, number: int, heads: Heads) -> UnitGroup:
    attention = f"{layers.name}.{number}.{heads.module}"
    query, key, value, out = (f"{attention}.{name}" for name in (heads.query, heads.key, heads.value, heads.out))
    holder, _, attribute = f"{attention}.{heads.size}".rpartition(".")
    size = getattr(_module(model, holder), attribute)
    if query == key == value:
        total = _length(model, query, "out")
        units = total // (3 * size)
        producers = _outputs(model, query, units, 3, total, size)
        values = tuple(replace(part, offsets=part.offsets[2:]) for part in producers)
        group = 1
    else:
        units = _length(model, key, "out") // size
        group = _length(model, query, "out") // size // units if units else _group(model, heads)
        parts = [
            _outputs(model, name, units, 1, _length(model, name, "out"), size * (group if name == query else 1))
            for name in (query, key, value)
        ]
        producers, values = tuple(part for found in parts for part in found), parts[2]
    if heads.bias is not None and number == 0:
        plain_weights(f"{attention}.{heads.bias}", _module(model, f"{attention}.{heads.bias}"))
        producers += (UnitSlice(f"{attention}.{heads.bias}.weight", 1, 1),)
    consumers = (_input(model, out, units, size * group),)
    counts = tuple((f"{attention}.{count}".rpartition(".")[0], count.rpartition(".")[2]) for count in heads.counts)
    per_unit = (group, 1)[: len(heads.config)]
    return UnitGroup(
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


def _group(model: nn.Module, heads: Heads) -> int:
    """How many queries the config gives each key, for a layer that has none left."""
    queries, keys = [getattr(model.config, name, None) for name in (*heads.config, "", "")[:2]]
    return queries // keys if queries and keys else 1


def _neurons(model: nn.Module, layers: LayerList, number: int) -> UnitGroup:
    neurons, layer = layers.stack.neurons, f"{layers.name}.{number}"
    ups = [name for name in (f"{layer}.{up}" for up in neurons.up) if _get(model, name) is not None]
    down = f"{layer}.{neurons.down}"
    if not ups:
        raise ArchitectureError(
            f"{layer} of {type(model).__name__} has none of {', '.join(neurons.up)}, where the table of architectures "
            f"expects its feed-forward network: register the architecture under another config.model_type"
        )
    units = _length(model, down, "in")
    parts = [_outputs(model, name, units, 1, _length(model, name, "out"), 1) for name in ups]
    return UnitGroup(
        name=down.removeprefix(base_prefix(model)),
        kind="neuron",
        layers=((layers.name, number),),
        units=units,
        producers=tuple(part for found in parts for part in found),
        consumers=(_input(model, down, units, 1),),
        values=(),
        counts=(),
        minimum=0 if isinstance(_module(model, down), nn.Linear) else 1,  # Conv1D cannot flatten what is empty
        config=(neurons.config,),
        per_unit=(1,),
        size=None,
    )


def _outputs(
    model: nn.Module, name: str, units: int, projections: int, total: int, width: int
) -> tuple[UnitSlice, ...]:
    """The weight and the bias of a module whose outputs are units, evenly; each of ``width`` where none is left."""
    _check_divides(model, name, total, units * projections)
    each = total // projections
    width = each // units if units else width
    offsets = tuple(range(0, total, each)) if each else (0,) * projections
    module = _module(model, name)
    weight = UnitSlice(f"{name}.weight", _dims(module)[0], width, offsets)
    if module._parameters.get("bias") is None:
        return (weight,)
    return weight, UnitSlice(f"{name}.bias", 0, width, offsets)


def _input(model: nn.Module, name: str, units: int, width: int) -> UnitSlice:
    total = _length(model, name, "in")
    _check_divides(model, name, total, units)
    return UnitSlice(f"{name}.weight", _dims(_module(model, name))[1], total // units if units else width)


def _check_divides(model: nn.Module, name: str, total: int, units: int) -> None:
    if total and (not units or total % units):
        raise ArchitectureError(
            f"{name} of {type(model).__name__} has {total} features for {units} units: expected a multiple; its "
            f"entry in the table of architectures does not fit"
        )


def _length(model: nn.Module, name: str, side: str) -> int:
    module = _module(model, name)
    weight = plain_weights(name, module).get("weight")
    if weight is None:
        raise ArchitectureError(
            f"{name} of {type(model).__name__} is a {type(module).__name__} without a weight: expected a Linear, as in "
            f"the table of architectures; register the architecture under another config.model_type"
        )
    return weight.shape[_dims(module)[side == "in"]]


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
