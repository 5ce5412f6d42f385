"""The method of a training whose settings name none: the most accurate, calibrated on the examples of the training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_prune.calibration.read import CalibrationData
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.presets import TRAINING_EXAMPLES, TRAINING_PRESET
from hf_prune.planning.schedule import Schedule
from hf_prune.pruning.local_masks import is_sharded
from hf_prune.utils.notices import QualityWarning, warn_user

_MOST_TOKENS = 1 << 15
_IMAGES = 128  # or sounds
_BATCH = 32
_DRAWN = 4  # times as many texts are drawn as are taken
_LOG = logging.getLogger(__name__)


def with_method(
    config: PruningConfig, calibration: CalibrationData | None, loader: Any, model: nn.Module
) -> tuple[PruningConfig, CalibrationData | None]:
    """Settings that name no method, with one, and the data that it is calibrated on.

    Args:
        config: The settings.
        calibration: Data of the user's; None for examples of the training.
        loader: The training's data loader.
        model: The model.

    Returns:
        Preset ``"best"``, and data; or the settings as they are, which are those of magnitude, with a warning where
        there is no data, or the weights are sharded.
    """
    if Schedule.parse(config.schedule or "one_shot").exchanges:
        return config, calibration  # which goes by magnitude and gradient
    if is_sharded(model):
        why = "its weights are sharded"
    else:
        calibration = training_batches(loader, config.seed) if calibration is None else calibration
        if calibration is not None:
            _LOG.info("no method is named: preset %r, calibrated on examples of the training", TRAINING_PRESET)
            return config.replace(preset=TRAINING_PRESET), calibration
        why = "examples cannot be drawn from its training data by number; pass calibration="
    warn_user(
        f"{type(model).__name__} is pruned by magnitude, which loses more than preset {TRAINING_PRESET!r}, the default "
        f"where there is data: {why}. criterion='magnitude' prunes so without this warning",
        QualityWarning,
    )
    return config, None


def training_batches(loader: Any, seed: int) -> list[Any] | None:
    """Some of the examples that a training reads, in batches as it makes them.

    Of texts the longest of a few thousand are taken: a data set may consist of phrases of some words, and calibration
    learns from tokens.

    Args:
        loader: A ``DataLoader``; its own random numbers are not touched.
        seed: Of the choice.

    Returns:
        Batches of up to 512 texts, or of so many that have about 32,768 tokens, or of 128 images or sounds; None if the
        data set has no numbers to draw by.
    """
    data: Any = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    if collate is None or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        return None
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    batches, tokens = [], 0
    with torch.random.fork_rng(devices=[]):
        examples = _longest(data, order)
        for start in range(0, len(examples), _BATCH):
            batches.append(collate(examples[start : start + _BATCH]))
            ids = batches[-1].get("input_ids")
            tokens += 0 if ids is None else ids.numel()
            if tokens >= _MOST_TOKENS:
                break
    return batches


def _longest(data: Any, order: list[int]) -> list[Any]:
    """The first images in an order; of texts, the longest of the first ones, in the same order."""
    first = [data[number] for number in order[:_BATCH]]
    if not all(isinstance(example, Mapping) and "input_ids" in example for example in first):
        return first + [data[number] for number in order[_BATCH:_IMAGES]]
    drawn = first + [data[number] for number in order[_BATCH : _DRAWN * TRAINING_EXAMPLES]]
    by_length = sorted(range(len(drawn)), key=lambda i: len(drawn[i]["input_ids"]), reverse=True)
    return [drawn[i] for i in sorted(by_length[:TRAINING_EXAMPLES])]
