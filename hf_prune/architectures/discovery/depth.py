"""Prove what was found in a small model once more in one as deep as the model itself, and as narrow as the small one.

Code may differ from layer to layer by their numbers, in ways that a model of two layers does not show.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_prune.architectures.base import Stack
from hf_prune.architectures.discovery.blocks import plain_attributes
from hf_prune.architectures.discovery.proof import differ, groups_in, layer_failure, unit_failure
from hf_prune.architectures.discovery.refusals import Refusal
from hf_prune.architectures.discovery.sample import FAILURES, LARGEST, Sample, make_sample
from hf_prune.architectures.growth import built
from hf_prune.architectures.layer_list import layer_list
from hf_prune.architectures.memory import remembered, text_of
from hf_prune.architectures.small_models import small_config
from hf_prune.errors import ArchitectureError

MOST_LAYERS = 64
_ANY = 10**6
_AT_DEPTH: dict[tuple[Any, ...], tuple[tuple[Stack, ...], Mapping[str, str]]] = {}
_MOST_REMEMBERED = 64  # classes and configs
_NOISE = 1e-6  # of weights, as a share: rounding errors are smaller


def deep_config(config: Any) -> tuple[Any, str] | None:
    """A small config with all layers of another, and its text; None if it is the small config itself.

    Args:
        config: A config of any size.
    """
    deep = small_config(config, MOST_LAYERS)
    text = text_of(deep)
    return None if text == text_of(small_config(config)) else (deep, text)


def running_sample(model_class: Any, config: Any, most: int = LARGEST) -> Sample | None:
    """A model with outputs that are numbers; None if it does not run, or has more parameters than ``most``."""
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0  # without one, classifiers take one text at a time
    try:
        sample = make_sample(model_class, config, most)
        outputs = sample.outputs()
    except FAILURES:
        return None
    return sample if any(t.numel() and bool(t.isfinite().all()) for t in outputs) else None


def is_steady(sample: Sample) -> bool:
    """Whether rounding errors stay small on their way through all layers, so that outputs can be compared."""
    shaken = copy.deepcopy(sample.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in shaken.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + _NOISE * torch.randn(parameter.shape, generator=generator))
    try:
        return not differ(sample.outputs(shaken), sample.outputs())
    except FAILURES:
        return False


def stacks_at_depth(
    model_class: Any, config: Any, stacks: tuple[Stack, ...]
) -> tuple[tuple[Stack, ...], Mapping[str, str]]:
    """What of some stacks holds in a model of all layers, and why the rest does not, by name.

    Where no such model can be run, layers of a kind that the small model has not are enough to refuse their stack.

    Args:
        model_class: A class of transformers' models.
        config: The config of a model of any size.
        stacks: What was proven in a small model.
    """
    try:
        deep = deep_config(config)
    except FAILURES:
        deep = None
    if deep is None:
        return stacks, {}
    key = (model_class, deep[1], _is_deeper(config), stacks)
    return remembered(_AT_DEPTH, key, lambda: _proven(model_class, deep[0], config, stacks), _MOST_REMEMBERED)


def _is_deeper(config: Any) -> str:
    """What a config has beyond the layers that are tried; empty if it has no more."""
    text = text_of(small_config(config, _ANY))
    return "" if text == text_of(small_config(config, MOST_LAYERS)) else text


def _proven(
    model_class: Any, deep: Any, config: Any, stacks: tuple[Stack, ...]
) -> tuple[tuple[Stack, ...], Mapping[str, str]]:
    sample = running_sample(model_class, deep)
    refused: dict[str, str] = {}
    kept = tuple(held(sample, stack, refused) for stack in stacks) if sample is not None else stacks
    if sample is not None and refused and not is_steady(sample):
        sample, refused, kept = None, {}, stacks
    if sample is None or _is_deeper(config):
        reference = small_config(config) if sample is None else deep
        kept = tuple(_of_proven_kinds(model_class, reference, config, stack, refused) for stack in kept)
    return kept, refused


def held(
    sample: Sample, stack: Stack, refused: dict[str, str], where: str | None = None, of_all_sizes: bool = False
) -> Stack:
    """What of a stack holds in a model that is nearer to the real one than the small model is.

    Args:
        sample: The model.
        stack: What was proven before.
        refused: To which is added why something does not hold.
        where: In what model, for the message; by default one of as many layers.
        of_all_sizes: Cut a quarter to three quarters of the units, and not a few.
    """
    total = len(layer_list(sample.model, stack).layers)
    what = where or f"in a model of {total} layers, "
    dense = sample.outputs()
    units = []
    for found in stack.units:
        try:
            groups = groups_in(sample.model, replace(stack, units=(found,)))
            failure = unit_failure(sample, groups, dense, of_all_sizes)
        except ArchitectureError as error:
            failure = str(error)
        if failure is None:
            units.append(found)
        else:
            name = found.consumers[0].name.removesuffix(".weight")
            reason = f"{found.kind}s were found, but {what}{failure}"
            refused[f"{stack.layers}.*.{name}"] = Refusal(reason, found.kind)
    stack = replace(stack, units=tuple(units))
    if stack.config:
        # Code that counts layers from either end shows itself where the first or the last one is gone.
        numbers = dict.fromkeys((stack.fixed, total - 1))
        failures = (layer_failure(sample, stack, number) for number in numbers if number < total)
        failure = next((failure for failure in failures if failure is not None), None)
        if failure is not None:
            refused[stack.layers] = Refusal(f"its layers stay: {what}{failure}", "layer")
            stack = replace(stack, config="", per_layer=(), fixed=0)
    return stack


def _of_proven_kinds(model_class: Any, reference: Any, config: Any, stack: Stack, refused: dict[str, str]) -> Stack:
    """A stack as it is if all its layers are of kinds that a proof has seen, or without all that was found in it."""
    try:
        proven, own = (layer_list(built(model_class, c), stack).layers for c in (reference, config))
    except FAILURES:
        return stack  # what was proven is then the model itself, or nothing can be compared
    seen = {_outline(layer) for layer in proven}
    strange = next((number for number, layer in enumerate(own) if _outline(layer) not in seen), None)
    if strange is None:
        return stack
    refused[stack.layers] = (
        f"what was found in its layers stays: layer {strange} has attributes that no layer of a small model has, and a "
        f"model of as many layers cannot be run to prove it there"
    )
    return replace(stack, units=(), config="", per_layer=(), fixed=0)


def _outline(layer: nn.Module) -> tuple[Any, ...]:
    """What layers of one kind have in common, whatever their sizes."""
    classes = tuple(type(module).__qualname__ for module in layer.modules())
    names = tuple((name, parameter.dim()) for name, parameter in layer.named_parameters())
    return classes, names, tuple(entry for entry in plain_attributes(layer) if isinstance(entry[2], bool | str))
