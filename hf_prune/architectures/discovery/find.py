"""Find what can be removed from a model of which the table says nothing; once for each architecture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from hf_prune.architectures.base import Stack
from hf_prune.architectures.discovery.blocks import idle_parts
from hf_prune.architectures.discovery.depth import stacks_at_depth
from hf_prune.architectures.discovery.holders import model_holders, native_class
from hf_prune.architectures.discovery.proof import first_line, layers_failure
from hf_prune.architectures.discovery.refusals import Refusal
from hf_prune.architectures.discovery.sample import FAILURES, Sample, make_sample, plain_surroundings
from hf_prune.architectures.discovery.search import Discovery, search, summary
from hf_prune.architectures.discovery.width import stacks_at_width
from hf_prune.architectures.memory import remembered, text_of
from hf_prune.architectures.small_models import small_config
from hf_prune.errors import ArchitectureError

_SMALL = 20_000_000  # parameters of a model that is tried itself where no smaller one of its class runs
_FOUND: dict[tuple[Any, ...], Discovery | str] = {}
_MOST_REMEMBERED = 128  # classes and configs, which take a second each
_OBSTACLES: dict[tuple[Any, ...], str | None] = {}


def discover(model: nn.Module) -> Discovery:
    """What can be removed from a model, found and proven on a small one of the same class and config.

    The result is remembered for each class and config, and for each class and small config, so only the first call
    takes time.

    Args:
        model: A transformers model, on any device; only its class and its config are looked at.

    Raises:
        ArchitectureError: If no small model can be built or run, or nothing in it can be removed.
    """
    holders, whole = model_holders(model), native_class(model)
    key = (whole, *((native_class(holder), text_of(holder.config)) for holder in [*holders, model]))
    found = remembered(_FOUND, key, functools.partial(_discovered, model, holders, whole), _MOST_REMEMBERED)
    if isinstance(found, Discovery):
        return found
    model_type = getattr(model.config, "model_type", "")
    raise ArchitectureError(
        f"the table of architectures has no entry for {model_type!r} ({type(model).__name__}), and {found}: say "
        f"where its layers, heads and neurons are with hf_prune.register_architecture({model_type!r}, Stack(...)), "
        f"or its channels with Channels(...), or prune it with another granularity"
    )


def _discovered(model: Any, holders: Sequence[Any], whole: Any) -> Discovery | str:
    found: Discovery | str = ""
    with plain_surroundings():
        for holder in holders:
            held = native_class(holder)
            found = _remembered(held, holder.config, functools.partial(_looked_up, held, holder.config))
            if isinstance(found, Discovery) and holder is not model:
                found = _remembered(whole, model.config, functools.partial(_proven_with_head, whole, found))
            if isinstance(found, Discovery):
                found = _at_depth(whole, model.config, found)
            if isinstance(found, Discovery):
                return found
    return found


def _remembered(model_class: Any, config: Any, find: Callable[[Any], Discovery | str]) -> Discovery | str:
    """What was found in small models of a class, or else is now; a sentence if nothing was.

    Args:
        model_class: The class.
        config: The config of the model, which is made small.
        find: Finds it, given the small config.
    """
    try:
        small, key = _small(model_class, config)
    except FAILURES as error:
        return f"no small config could be made of its own ({first_line(error)})"
    return remembered(_FOUND, key, lambda: find(small), _MOST_REMEMBERED)


def _at_depth(model_class: Any, config: Any, found: Discovery) -> Discovery | str:
    """What holds of what was found where the model has all its layers, or its widths; a sentence if nothing does."""
    stacks, refused = stacks_at_depth(model_class, config, found.stacks)
    stacks, of_widths = stacks_at_width(model_class, config, stacks)
    refused = {**refused, **of_widths}
    return summary(stacks, {**found.refused, **refused}) if refused else found


def _looked_up(model_class: Any, config: Any, small: Any) -> Discovery | str:
    sample = _running_sample(model_class, small)
    if isinstance(sample, str):  # a config that is small already says best which numbers fit together
        own = _running_sample(model_class, config, most=_SMALL)
        sample = sample if isinstance(own, str) else own
    return sample if isinstance(sample, str) else _searched(sample)


def _searched(sample: Sample) -> Discovery | str:
    """What is found in a small model; a sentence if its code cannot be followed."""
    try:
        found = search(sample)
        return (
            replace(found, refused={**found.refused, **idle_parts(sample)}) if isinstance(found, Discovery) else found
        )
    except FAILURES as error:
        return f"what its code computes could not be followed ({first_line(error)})"


def _running_sample(model_class: Any, config: Any, most: int | None = None) -> Sample | str:
    """A small model whose outputs tell something, or a sentence why there is none.

    Args:
        model_class: Its class.
        config: A small config.
        most: The most parameters that it may have, if fewer than usual.
    """
    why = "a small model of its class could not be run to find them"
    try:
        sample = make_sample(model_class, config) if most is None else make_sample(model_class, config, most)
        outputs = sample.outputs()
    except FAILURES as error:
        return f"{why} ({first_line(error)})"
    # Where nothing is a number, nothing that is removed would show.
    return (
        sample if any(t.numel() and bool(t.isfinite().all()) for t in outputs) else f"{why}: its outputs are no numbers"
    )


def _small(model_class: Any, config: Any) -> tuple[Any, tuple[Any, str]]:
    """A small config, and by what is remembered what was found for it."""
    small = small_config(config)
    return small, (model_class, text_of(small))


def _proven_with_head(model_class: Any, base: Discovery, small: Any) -> Discovery | str:
    """What holds of what was found in a base model once its head is on it; a sentence if nothing does.

    A head can pick hidden states by the number of a layer: the layers are proven again with it.
    """
    if getattr(small, "pad_token_id", 0) is None:
        small.pad_token_id = 0  # without one, classifiers take one text at a time
    refused, stacks = dict(base.refused), []
    for stack in base.stacks:
        failure = layers_failure(model_class, small, stack) if stack.config else None
        if failure is not None:
            reason = f"its layers stay: with the head of {model_class.__name__}, {failure}"
            refused[stack.layers] = Refusal(reason, "layer")
            stack = replace(stack, config="", per_layer=(), fixed=0)
        stacks.append(stack)
    return summary(stacks, refused)


def layers_obstacle(model: nn.Module, stack: Stack) -> str | None:
    """Why the layers of a stack that the table names cannot be removed from a model; None if a small one proves it.

    Where no small model can be built or run, the table is trusted. The result is remembered as that of discovery.

    Args:
        model: A transformers model; only its class and its config are looked at.
        stack: The entry of the table.
    """
    with plain_surroundings():
        model_class = native_class(model)
        try:
            small, key = _small(model_class, model.config)
        except FAILURES:
            return None
        find_out = functools.partial(_table_failure, model_class, small, stack)
        return remembered(_OBSTACLES, (*key, stack.layers), find_out, _MOST_REMEMBERED)


def _table_failure(model_class: Any, small: Any, stack: Stack) -> str | None:
    if getattr(small, "pad_token_id", 0) is None:
        small.pad_token_id = 0
    runs = not isinstance(_running_sample(model_class, small), str)
    return layers_failure(model_class, small, stack) if runs else None
