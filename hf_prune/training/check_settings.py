"""Refuse settings that a training cannot follow, before its first step."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hf_prune.architectures.kinds.registry import kind_named
from hf_prune.criteria.base import LABELLED, TRAINED
from hf_prune.errors import ConfigError
from hf_prune.planning.choices import MOVEMENT
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.schedule import Schedule
from hf_prune.planning.traits import removed_kinds

if TYPE_CHECKING:
    from transformers import TrainingArguments


def check_settings(config: PruningConfig, schedule: Schedule, steps: int, *, calibrates: bool) -> None:
    """Check that a config and a schedule agree with each other and with the training.

    Args:
        config: The settings.
        schedule: When masks change.
        steps: Optimizer steps of the whole training.
        calibrates: Whether calibration batches are there.

    Raises:
        ConfigError: If they contradict one another, or the schedule does not fit the training.
    """
    schedule.span(steps)  # raises if the training is too short
    _check_kind_of_pruning(config)
    _check_schedule(config, schedule)
    _check_data(config, calibrates)


def averages_gradients(config: PruningConfig | None, *, calibrates: bool) -> bool:
    """Whether the criterion scores weights by a running average of the training's own gradients."""
    return config is not None and config.criterion == "taylor" and not calibrates


def _check_kind_of_pruning(config: PruningConfig) -> None:
    for kind in removed_kinds(config):
        if not kind_named(kind).trained_with_masks:
            raise ConfigError(
                f"granularity {kind!r} changes what a model computes at once: prune {kind}s before the training, with "
                f"hf_prune.prune, or leave {kind!r} out"
            )
    if config.polish is not None:
        raise ConfigError("polish is a training of its own: leave it out, and train for longer")


def _check_schedule(config: PruningConfig, schedule: Schedule) -> None:
    if config.sparsity is None and schedule.name != "one_shot":
        raise ConfigError(
            f"schedule {schedule.name!r} needs a sparsity to grow to: give sparsity=, or schedule='one_shot'"
        )
    if schedule.exchanges and (config.criterion != "magnitude" or config.granularity != "unstructured"):
        raise ConfigError(
            f"schedule {schedule.name!r} exchanges single weights by magnitude and gradient: expected "
            f"criterion 'magnitude' and granularity 'unstructured', found {config.criterion!r} and "
            f"{config.granularity!r}"
        )
    if config.sparsity is not None and schedule.initial > config.sparsity:
        raise ConfigError(
            f"the schedule starts at a sparsity of {schedule.initial:g} and ends at {config.sparsity:g}: "
            f"expected one that grows"
        )


def _check_data(config: PruningConfig, calibrates: bool) -> None:
    averages = averages_gradients(config, calibrates=calibrates)
    # Statistics that the training cannot provide. Its own gradients replace those of labelled calibration data.
    missing = config.needs - TRAINED - (LABELLED if averages else frozenset())
    if not calibrates and (missing or config.learns_allocation or (config.learns_units and not averages)):
        raise ConfigError(
            f"criterion {config.criterion!r} with repair={config.repair!r} and allocation={config.allocation!r} "
            f"looks at data: pass calibration=batches, or choose 'magnitude', 'taylor' or 'movement' and no repair"
        )
    if config.criterion in MOVEMENT and (config.repair is not None or config.learns_allocation):
        raise ConfigError(
            f"criterion {config.criterion!r} keeps the values of the training: leave out repair, and allocations that "
            f"are learned from data"
        )


def refuse_deepspeed(args: TrainingArguments) -> None:
    """Raises :class:`ConfigError` for a training with DeepSpeed."""
    if getattr(args, "deepspeed", None) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(
            "DeepSpeed is not supported, since it holds parameters and gradients where masks do not reach them: use "
            "DDP or FSDP2 (accelerate launch --use_fsdp --fsdp_version 2)"
        )
