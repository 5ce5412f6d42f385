"""Prune a copy of a model as a candidate says, and measure what is left."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

from hf_prune.conversion.compression import weights_size
from hf_prune.evaluation.sparsity_report import SparsityReport, sparsity_report
from hf_prune.evaluation.structure_report import structure_report
from hf_prune.mixin import prunable
from hf_prune.planning.config import PruningConfig
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.search.held_out import HeldOut
from hf_prune.search.point import SearchPoint
from hf_prune.utils.wrapping import sole_model


def measure_candidate(
    model: Any,
    config: PruningConfig,
    data: HeldOut,
    dense: Any,
    *,
    name: str,
    preset: str,
    compressed: bool,
    folder: Path,
    progress: bool = False,
) -> tuple[SearchPoint, Any, SparsityReport]:
    """Prune a copy of a model, shrink it if units went, save it for its size, and score it.

    Args:
        model: The dense model, which is not changed.
        config: The settings.
        data: What it learns from and is scored on.
        dense: The score of the dense model.
        name: What to call the candidate.
        preset: The preset that the settings are of.
        compressed: Whether its size is that of a compressed checkpoint.
        folder: Where it is saved for a moment.
        progress: Show progress bars.

    Returns:
        What was measured, the pruned model, and its report.

    Raises:
        HfPruneError: As :func:`hf_prune.prune` does.
    """
    whole = prunable(copy.deepcopy(model))
    pruned: Any = sole_model(whole)  # the transformers model in one of sentence-transformers
    before = sparsity_report(pruned, config)
    start = time.perf_counter()
    batches = data.calibration(config)
    pruned.prune(config, calibration=batches, polish_data=data.polish_data(config), progress=progress)
    seconds = time.perf_counter() - start
    store = MaskStore.of(pruned)
    speed = None if store is None else store.speed
    report = sparsity_report(pruned).with_before(before)
    plain, sparsity = True, report.model_sparsity
    if config.removes_units:
        structure = structure_report(pruned.shrink())
        plain, sparsity = not structure.needs_plugin, 1 - structure.parameters / structure.parameters_before
        report = dataclasses.replace(report, structure=structure)
    size = saved_size(whole, folder, compressed=compressed)
    score = data.score(whole, f"{name}: scoring" if progress else "")
    point = SearchPoint(
        name=name,
        preset=preset,
        config=config,
        plain=plain and not compressed,
        loss=data.loss(dense, score),
        score=value_of(score),
        size=size,
        speedup=1.0 if speed is None else speed.measured,
        sparsity=sparsity,
        seconds=round(seconds, 1),
    )
    return point, whole, report


def value_of(score: Any) -> float:
    """The number that a score is: a perplexity, or the value of its metric."""
    return float(score.perplexity if hasattr(score, "perplexity") else score.value)


def saved_size(model: Any, folder: Path, *, compressed: bool) -> int:
    """How many bytes the weights of a model take on disk; nothing stays there."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model.save_pretrained(Path(temporary) / "model", compressed=compressed)
        return weights_size(Path(temporary) / "model")
