"""Prove on a small model that removing units gives the outputs of zeroing them, and removing layers of bypassing."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.base import Stack
from hf_prune.architectures.bypass import bypass
from hf_prune.architectures.cut_units import cut_units
from hf_prune.architectures.discovery.sample import FAILURES, Sample, build_model, make_sample
from hf_prune.architectures.found_units import found_groups
from hf_prune.architectures.layer_list import layer_list
from hf_prune.architectures.memory import remembered
from hf_prune.architectures.remove_layers import remove_layers
from hf_prune.architectures.settings import config_of_setting, set_setting
from hf_prune.architectures.unit_groups import UnitGroup

_TOLERANCE = 2e-4  # of outputs, as a share of the largest; errors of float32 stay far below, wrong units far above
_QUARTERS = (3, 1, 2)  # of the units, from layer to layer
_MORE_LAYERS = 3  # than the small model has, in which each is tried


def groups_in(model: nn.Module, stack: Stack) -> list[UnitGroup]:
    """The groups of units of all kinds that a stack has."""
    kinds = dict.fromkeys(units.kind for units in stack.units)
    layers = layer_list(model, stack)
    return [group for kind in kinds for group in found_groups(model, layers, kind)]


def unit_failure(
    sample: Sample,
    groups: Sequence[UnitGroup],
    dense: Sequence[Tensor],
    of_all_sizes: bool = False,
    zeroed: dict[Any, list[Tensor]] | None = None,
) -> str | None:
    """Why units cannot be removed; None if removing them gives the outputs of zeroing them.

    Every layer loses another number of units, so the proof also shows that the code runs with unequal layers.

    Args:
        sample: The small model.
        groups: What to remove units from.
        dense: The outputs of the small model.
        of_all_sizes: Remove a quarter to three quarters of the units, and not one to three.
        zeroed: Remembers the outputs with zeros, which are the same however the units are named.
    """
    generator = torch.Generator().manual_seed(0)
    gone, kept = {}, {}
    for number, group in enumerate(groups):
        most = max(group.units - group.minimum, 1)
        order = torch.randperm(group.units, generator=generator)
        count = 1 + number % min(most, 3)
        if of_all_sizes:
            count = min(max(group.units * _QUARTERS[number % 3] // 4, 1), most)
        gone[group.name], kept[group.name] = order[:count], order[count:].sort().values

    def with_zeros() -> list[Tensor]:
        with sample.zeroed((piece, gone[group.name]) for group in groups for piece in group.consumers):
            return sample.outputs()

    key = tuple((tuple(gone[group.name].tolist()), group.consumers) for group in groups)
    expected = remembered({} if zeroed is None else zeroed, key, with_zeros)
    return cut_failure(sample, groups, kept, expected, dense)


def cut_failure(
    sample: Sample,
    groups: Sequence[UnitGroup],
    kept: Mapping[str, Tensor],
    expected: Sequence[Tensor],
    dense: Sequence[Tensor],
) -> str | None:
    """Why units cannot be cut from a small model; None if that gives what zeros in their place gave.

    Args:
        sample: The small model.
        groups: What to remove units from.
        kept: The units that stay, by the name of the group.
        expected: The outputs with zeros in place of the others.
        dense: The outputs of the small model.
    """
    if not differ(expected, dense):
        return "zeroing them changes no output"
    cut = sample.twin()
    try:
        cut_units(cut, groups, kept)
        outputs = sample.outputs(cut)
    except FAILURES as error:
        return f"the code does not run without them ({first_line(error)})"
    if differ(outputs, expected):
        return "outputs are others without them than with zeros"
    configs: list[Any] = [cut.config, sample.model.config]
    if configs[0].to_dict() != configs[1].to_dict() and (other := _also_sized(cut, groups)):
        return f"the number of them in the config is also a size of {other}"
    return None


def _also_sized(cut: Any, groups: Sequence[UnitGroup]) -> str | None:
    """What else has other sizes in a model that the config of a cut one builds; None if nothing has."""
    rebuilt = rebuilt_model(cut)
    if rebuilt is None:
        return "what it then cannot build"
    pieces = {(piece.name, piece.dim) for group in groups for piece in group.slices + group.buffers}
    # With a row for each head, a tensor has the size of a head beside it, which many configs divide out of the rest.
    head_sizes: dict[str, set[int]] = {}
    for group in groups:
        widths = {piece.width for piece in group.slices if piece.width > 1}
        rows = (piece.name for piece in group.slices + group.buffers if piece.width == 1)
        head_sizes |= dict.fromkeys(rows, widths) if group.consumers[0].width > 1 else {}
    shapes = {name: tensor.shape for name, tensor in rebuilt.named_parameters()}
    for name, tensor in cut.named_parameters():
        for dim, (size, other) in enumerate(zip(tensor.shape, shapes.get(name, ()), strict=False)):
            if size != other and (name, dim) not in pieces and size not in head_sizes.get(name, ()):
                return name
    return None


def layers_failure(model_class: Any, config: Any, stack: Stack) -> str | None:
    """Why some layer of a stack cannot be removed; None if removing any one gives the outputs of bypassing it.

    Every layer is tried, in a model of a few more layers where the config allows that: code that picks hidden states by
    the number of a layer shows itself only if the layer lies before them, or after them.

    Args:
        model_class: The class of the model.
        config: A small config.
        stack: What discovery found, with the attribute of the config that counts the layers.
    """
    try:
        sample = _longer_sample(model_class, config, stack) or make_sample(model_class, config)
        total = len(layer_list(sample.model, stack).layers)
    except FAILURES as error:
        return f"a small model could not be run to prove that they can go ({first_line(error)})"
    failures = (layer_failure(sample, stack, number) for number in range(stack.fixed, total))
    return next((failure for failure in failures if failure is not None), None)


def _longer_sample(model_class: Any, config: Any, stack: Stack) -> Sample | None:
    """A small model with more layers than its config has; None if there is none."""
    config = copy.deepcopy(config)
    try:
        holder, key = config_of_setting(config, stack.config)
        total = getattr(holder, key) + _MORE_LAYERS
        set_setting(config, stack.config, total)
        for name in stack.per_layer:
            set_setting(config, name, list(islice(cycle(getattr(config, name)), total)))
        sample = make_sample(model_class, config)
        return sample if len(layer_list(sample.model, stack).layers) == total else None
    except FAILURES:
        return None


def layer_failure(sample: Sample, stack: Stack, number: int) -> str | None:
    """Why a layer cannot be removed; None if removing it gives the outputs of bypassing it."""
    bypassed, removed = sample.twin(), sample.twin()
    name = f"{layer_list(bypassed, stack).name}.{number}"
    try:
        bypass(bypassed.get_submodule(name))
        expected = sample.outputs(bypassed)
    except FAILURES as error:
        return f"the code does not run while layer {number} is bypassed ({first_line(error)})"
    try:
        remove_layers(removed, [layer_list(removed, stack)], {name})
        outputs = sample.outputs(removed)
    except FAILURES as error:
        return f"the code does not run without layer {number} ({first_line(error)})"
    if differ(outputs, expected):
        return f"outputs are others without layer {number} than when it is bypassed"
    return None


def differ(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists of outputs differ by more than rounding."""
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return True
    for one, other in zip(first, second, strict=True):
        scale = float(other.nan_to_num(0, 0, 0).abs().max()) if other.numel() else 0.0
        if not torch.allclose(one, other, rtol=0, atol=_TOLERANCE * max(scale, 1e-6), equal_nan=True):
            return True
    return False


def rebuilt_model(model: Any) -> Any:
    """A model of the same class from the config of a model, with its weights yet to be set; None if it fails."""
    try:
        config = type(model.config).from_dict(model.config.to_dict())  # what a checkpoint's config.json would say
        return build_model(type(model), config)
    except FAILURES:
        return None


def computes_the_same(sample: Sample, model: nn.Module, rebuilt: nn.Module) -> bool:
    """Whether a model that was built from a config computes what a cut model computes, with its weights."""
    try:
        rebuilt.load_state_dict(model.state_dict(), strict=True)
        return not differ(sample.outputs(rebuilt), sample.outputs(model))
    except FAILURES:
        return False


def zero_values(sample: Sample, group: UnitGroup, consumer: str) -> tuple[str, ...]:
    """Producers that make units compute zero once their slices of them are zero; empty if there are none.

    Args:
        sample: The small model.
        group: Units of one layer.
        consumer: The module that reads them.

    Returns:
        Names of parameters: of one module if its slices suffice, or else all.
    """
    by_module: dict[str, list[str]] = {}
    for piece in group.producers:
        by_module.setdefault(piece.name.rpartition(".")[0], []).append(piece.name)
    every = tuple(dict.fromkeys(piece.name for piece in group.producers))
    for names in [*(tuple(names) for names in by_module.values()), every]:
        if _is_zero(sample, group, consumer, names):
            return names
    return ()


def _is_zero(sample: Sample, group: UnitGroup, consumer: str, names: Sequence[str]) -> bool:
    """Whether the first unit is zero where the consumer reads it, once its slices of some producers are zero."""
    first = torch.tensor([0])
    module: Any = sample.model.get_submodule(consumer)
    read: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        with sample.zeroed((piece, first) for piece in group.producers if piece.name in names):
            sample.outputs()
    finally:
        handle.remove()
    index = group.consumers[0].index(first)
    feature_dim = 1 if module.weight.dim() > 2 else -1
    return bool(read) and all(not bool(tensor.index_select(feature_dim, index).any()) for tensor in read)


def first_line(error: Exception) -> str:
    """An error in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:160]}"
