"""Prove what was found in a small model once more in one as wide as the model itself, where that is small enough.

Code may do something else with many heads or in wide layers, such as a split at a fixed place, which a model of 4 heads
and 64 features does not show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_prune.architectures.base import Stack
from hf_prune.architectures.discovery.depth import MOST_LAYERS, deep_config, held, is_steady, running_sample
from hf_prune.architectures.discovery.sample import FAILURES
from hf_prune.architectures.memory import remembered, text_of
from hf_prune.architectures.small_models import small_config

MOST_PARAMETERS = 32_000_000  # of the model that is tried: two layers of 1,024 features, or a small model as a whole
_AT_WIDTH: dict[tuple[Any, ...], tuple[tuple[Stack, ...], Mapping[str, str]]] = {}
_MOST_REMEMBERED = 64  # classes and configs


def stacks_at_width(
    model_class: Any, config: Any, stacks: tuple[Stack, ...]
) -> tuple[tuple[Stack, ...], Mapping[str, str]]:
    """What of some stacks holds in a model of the real widths, and why the rest does not, by name.

    That model has all layers if it is small enough with them, or else those of a small model. Where it is still too
    large, or does not run, nothing more is proven.

    Args:
        model_class: A class of transformers' models.
        config: The config of a model of any size.
        stacks: What was proven before.
    """
    try:
        wide = [small_config(config, most, widths=True) for most in (MOST_LAYERS, None)]
        seen = {text_of(small_config(config)), *((deep[1],) if (deep := deep_config(config)) else ())}
    except FAILURES:
        return stacks, {}
    if seen & set(map(text_of, wide)):
        return stacks, {}  # which is the small model, or the deep one
    key = (model_class, text_of(wide[0]), stacks)
    return remembered(_AT_WIDTH, key, lambda: _proven(model_class, wide, stacks), _MOST_REMEMBERED)


def _proven(
    model_class: Any, configs: list[Any], stacks: tuple[Stack, ...]
) -> tuple[tuple[Stack, ...], Mapping[str, str]]:
    samples = (running_sample(model_class, config, MOST_PARAMETERS) for config in configs)
    sample = next((sample for sample in samples if sample is not None), None)
    if sample is None:
        return stacks, {}
    refused: dict[str, str] = {}
    kept = tuple(held(sample, stack, refused, "in a model of its widths, ", of_all_sizes=True) for stack in stacks)
    return (stacks, {}) if refused and not is_steady(sample) else (kept, refused)
