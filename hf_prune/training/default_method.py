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

    Of examples with token ids, the longest of four times as many are taken: a data set may consist of phrases of some
    words, and calibration learns from tokens.

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
        chosen = _longest(data, order)
        for start in range(0, len(chosen), _BATCH):
            batches.append(collate([data[number] for number in chosen[start : start + _BATCH]]))
            ids = batches[-1].get("input_ids")
            tokens += _MOST_TOKENS // 4 if ids is None else ids.numel()  # 128 images or sounds
            if tokens >= _MOST_TOKENS:
                break
    return batches


def _longest(data: Any, order: list[int]) -> list[int]:
    """The numbers of the longest texts among the first in an order, in that order; of other examples, the first."""
    lengths: dict[int, int] = {}
    total = 0
    for number in order[: _DRAWN * TRAINING_EXAMPLES]:
        length = _tokens(data[number])
        if length is None:
            return order[:TRAINING_EXAMPLES]
        lengths[number] = length
        total += length
        if total >= _DRAWN * _MOST_TOKENS:
            break
    longest = set(sorted(lengths, key=lengths.__getitem__, reverse=True)[:TRAINING_EXAMPLES])
    return [number for number in lengths if number in longest]


def _tokens(example: Any) -> int | None:
    """How many tokens an example has, without padding; None if it is no plain text, or not tokenized yet."""
    if not isinstance(example, Mapping) or "input_ids" not in example or not all(map(_is_flat, example.values())):
        return None
    ids, mask = example["input_ids"], example.get("attention_mask")
    return len(ids) if mask is None else int(torch.as_tensor(mask).sum())


def _is_flat(value: Any) -> bool:
    """Whether a value is a number, a text or a row of numbers: no image, and not several texts."""
    if isinstance(value, list | tuple):
        return not (value and isinstance(value[0], list | tuple))
    if hasattr(value, "ndim"):  # an array
        return bool(value.ndim <= 1)
    return value is None or isinstance(value, str | int | float)
