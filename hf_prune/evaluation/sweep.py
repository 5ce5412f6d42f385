"""Sweep: prune from the dense weights at every sparsity, score each result, and name the sweet spot.

Results are written after every point, so an interrupted sweep continues where it stopped; results of other settings are
never mixed in.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.calibration.batches import Batches, needed_batches
from hf_prune.errors import ConfigError, SweepError
from hf_prune.evaluation.allowed_loss import AllowedLoss
from hf_prune.evaluation.scores import (
    Score,
    compare_scores,
    known_truth,
    left_out_distributions,
    score_doubt,
    score_model,
)
from hf_prune.evaluation.sparsity_report import sparsity_report
from hf_prune.evaluation.statistics import check_confidence
from hf_prune.evaluation.sweep_files import check_is_sweep, read_results, sweep_settings
from hf_prune.evaluation.sweep_point import SweepPoint
from hf_prune.evaluation.sweep_result import FILES, SweepResult
from hf_prune.evaluation.sweep_speed import check_same_workload, timed_workload
from hf_prune.inference.acceleration.accelerate import measure_acceleration
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.plan import PruningPlan
from hf_prune.planning.traits import fixed_sparsity
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.utils.earlier_results import own_results
from hf_prune.utils.files import write_json
from hf_prune.utils.locks import writes_alone
from hf_prune.utils.notices import warn_user
from hf_prune.utils.output_folder import check_output, warn_replaced

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

DEFAULT_SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8)


@writes_alone("sweep")
def run_sweep(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset,
    *,
    sparsities: Iterable[float] | None = None,
    criteria: Iterable[str] = ("magnitude",),
    config: PruningConfig | None = None,
    calibration: Sequence[Mapping[str, Any]] | None = None,
    polish_data: Sequence[Mapping[str, Any]] | None = None,
    tolerance: float = 2.0,
    max_flips: float | None = None,
    confidence: float = 0.95,
    accelerate: bool | Mapping[str, int] = False,
    out: str | os.PathLike[str] | None = None,
    restart: bool = False,
    overwrite: bool = False,
    name: str = "",
    source: str = "",
    split: str = "",
    progress: bool | None = None,
    **evaluation: Any,
) -> SweepResult:
    """Prune a model at several sparsities, from its dense weights each time, and score every result.

    Args:
        model: A dense sequence classifier, or a model of sentence-transformers; it is dense again afterwards.
        tokenizer: Its tokenizer.
        dataset: Labelled sentences, as for :func:`hf_prune.evaluate_classification`, or scored texts, as for
            :func:`hf_prune.evaluate_sentences`.
        sparsities: Shares to remove, 0 to 1; 0 is the dense model, which is always measured. By default what an N:M
            granularity fixes, or else 0.3, 0.5, 0.6, 0.7 and 0.8.
        criteria: Names of criteria.
        config: All other settings.
        calibration: Batches for criteria that need them.
        polish_data: Batches for a polish, if more or others than ``calibration``.
        tolerance: Largest accepted drop, in points: hundredths of the score.
        max_flips: Instead, for classifiers: the largest share of answers that may change, right or not, in percent.
        confidence: Of intervals and sweet spot.
        accelerate: Also measure how many times as fast the dense model and every point are on the kernels that
            :func:`hf_prune.accelerate` chooses, on this machine's CPU: True, or a workload with ``batch_size``,
            ``length`` and ``threads``.
        out: Folder for ``results.json``, ``results.csv``, ``tradeoff.png`` and, with ``accelerate``, ``speed.png``;
            what it already has is not measured again.
        restart: Ignore what ``out`` has.
        overwrite: Write into ``out`` also if there is something else in it; files of other names stay.
        name: What to call the model in results.
        source: Where the data is from, for results.
        split: Which split it is, for results.
        progress: Show progress bars.
        **evaluation: Passed to :func:`hf_prune.evaluate_classification` or :func:`hf_prune.evaluate_sentences`.

    Returns:
        The result.

    Raises:
        ConfigError: If ``max_flips`` is out of range, or the model's answers are not classes; or ``accelerate`` is no
            workload.
        KernelError: If ``accelerate`` is asked for, and the model is not on the CPU.
        SweepError: If the model is already pruned, or ``out`` holds results of other settings, edited ones, or
            speed-ups of another workload or machine.
        CheckpointError: If ``out`` holds something else.
        HfPruneError: As :func:`hf_prune.prune` does, for any of the points and before the first is measured.
    """
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise SweepError(f"{out} is a file: expected a folder for the results")
    if out is not None:
        earlier = (Path(out) / "results.json").is_file()  # checked below, unless it is to be replaced
        if restart:
            own_results(Path(out) / "results.json", check_is_sweep, overwrite=overwrite)
        check_output(out, "sweep", overwrite=overwrite or earlier)
    base = config or PruningConfig()
    if sparsities is None:
        fixed = fixed_sparsity(base)
        sparsities = DEFAULT_SPARSITIES if fixed is None else (fixed,)
    sparsities, criteria = list(dict.fromkeys(sparsities)), list(dict.fromkeys(criteria))
    configs = [base.replace(criterion=c, sparsity=float(s)) for c in criteria for s in sparsities if s != 0]
    plans = check_points(model, configs, calibration, polish_data)
    check_confidence(confidence)
    workload = timed_workload(accelerate)
    if max_flips is not None:
        AllowedLoss.of(None, max_flips)  # refuses what is out of range
    parameters = sum(p.numel() for p in model.parameters())
    score: dict[str, Any] = {"source": source, "split": split, **evaluation}
    settings = sweep_settings(model, dataset, base, calibration, polish_data, tokenizer, name, score)
    folder = None if out is None else Path(out)
    results = None if folder is None else folder / "results.json"
    earlier_results = None
    if results is not None and not restart and results.exists():
        truth, fresh = known_truth(model, dataset, score)
        known = {(plan.config.criterion, plan.config.sparsity): plan for plan in plans}

        def plan_of(point: SweepPoint) -> PruningPlan | UnitPlan:
            key = (point.criterion, point.sparsity)
            if key not in known:  # of an earlier sweep
                known[key] = prune(model, base.replace(criterion=key[0], sparsity=key[1]), dry_run=True)
            return known[key]

        earlier_results = read_results(results, settings, confidence, model, truth, fresh, plan_of)
    dense_acceleration = None
    if earlier_results is not None:
        dense, points, calibrated, dense_acceleration = earlier_results
        settings = {**settings, "calibration": settings["calibration"] or calibrated}
        missing = {(c.criterion, c.sparsity) for c in configs} - {(p.criterion, p.sparsity) for p in points}
        if missing and left_out_distributions(dense, int(model.config.num_labels or 0)):
            dense = score_model(model, tokenizer, dataset, **score, progress=progress and "dense")
    else:
        points = []
    if workload is not None:
        check_same_workload(results, [dense_acceleration, *(p.acceleration for p in points)], model, workload)
        dense_acceleration = dense_acceleration or measure_acceleration(model, workload, progress)
    if earlier_results is None:
        dense = score_model(model, tokenizer, dataset, **score, progress=progress and "dense")

    scored_by_classes = bool(points or getattr(dense, "distributions", ()))
    if max_flips is not None and not (scored_by_classes and all(p.comparison.divergence is not None for p in points)):
        raise ConfigError(
            f"max_flips is {max_flips:g}, and {dense.metric} was scored here without answers that are classes: use "
            f"tolerance, or restart if an earlier version scored it"
        )
    if doubt := score_doubt(dense, confidence):  # warn before pruning, which takes minutes
        warn_user(f"{doubt}; no sweet spot will be named")

    def result() -> SweepResult:
        order = {(p.config.criterion, p.config.sparsity): i for i, p in enumerate(plans)}
        ranked = sorted(points, key=lambda p: order.get((p.criterion, p.sparsity), len(order)))
        shown = (tolerance, confidence, max_flips, dense_acceleration)
        return SweepResult(settings, parameters, dense, tuple(ranked), *shown)

    done = {(p.criterion, p.sparsity): p for p in points}
    if results is not None:
        if earlier_results is None:
            warn_replaced(results.parent, FILES)
        write_json(results, result().to_dict())
    for point_config in configs:
        point = done.get((point_config.criterion, point_config.sparsity or 0.0))
        if point is None:
            seen = (calibration, dense, confidence, score, progress)
            points.append(
                measure_point(
                    model, tokenizer, dataset, point_config, *seen, polish_data=polish_data, workload=workload
                )
            )
        elif workload is not None and point.acceleration is None:
            with _pruned(model, point_config, calibration, polish_data, progress):
                timed = measure_acceleration(model, workload, progress)
            points[points.index(point)] = dataclasses.replace(point, acceleration=timed)
        else:
            continue
        if results is not None:
            write_json(results, result().to_dict())
    if folder is not None:
        result().write(folder)
    return result()


def check_points(
    model: PreTrainedModel,
    configs: Iterable[PruningConfig],
    calibration: Batches | None,
    polish_data: Batches | None = None,
) -> list[PruningPlan | UnitPlan]:
    """Make the plans of all points, so that errors come before any is measured.

    Raises:
        SweepError: If the model is pruned already.
        HfPruneError: As :func:`hf_prune.prune` does.
    """
    if MaskStore.of(model) is not None:
        raise SweepError("the model has masks: every point is pruned from dense weights; load a dense model")
    plans = [prune(model, config, dry_run=True, polish_data=polish_data) for config in configs]
    for plan in plans if calibration is None else []:
        needed_batches(plan.config, None, polish_data)  # refuses
    return plans


def measure_point(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset,
    config: PruningConfig,
    calibration: Batches | None,
    dense: Score,
    confidence: float,
    score: Mapping[str, Any],
    progress: bool | None,
    polish_data: Batches | None = None,
    workload: Mapping[str, int] | None = None,
) -> SweepPoint:
    """Prune from the dense weights, score, and restore the dense weights.

    Args:
        model: A dense model.
        tokenizer: Its tokenizer.
        dataset: What to score.
        config: How to prune.
        calibration: Batches, if the config needs them.
        dense: The score of the dense model on the same data.
        confidence: Of the comparison with it.
        score: Options of :func:`hf_prune.evaluate_classification` or :func:`hf_prune.evaluate_sentences`.
        progress: Show progress bars.
        polish_data: Batches for a polish, if others than ``calibration``.
        workload: What to time on the fastest kernels, see :func:`run_sweep`; None times nothing.
    """
    assert config.sparsity is not None
    start = time.perf_counter()
    with _pruned(model, config, calibration, polish_data, progress):
        seconds = time.perf_counter() - start
        report = sparsity_report(model)
        title = f"{config.criterion} {100 * config.sparsity:g} %"
        evaluation = score_model(model, tokenizer, dataset, **score, progress=progress and title)
        acceleration = None if workload is None else measure_acceleration(model, workload, progress)
    return SweepPoint(
        criterion=config.criterion,
        sparsity=config.sparsity,
        target_sparsity=report.target_sparsity,
        model_sparsity=report.model_sparsity,
        remaining=report.remaining,
        prune_seconds=round(seconds, 3),
        evaluation=evaluation,
        comparison=compare_scores(dense, evaluation, confidence=confidence),
        acceleration=acceleration,
    )


@contextmanager
def _pruned(
    model: PreTrainedModel,
    config: PruningConfig,
    calibration: Batches | None,
    polish_data: Batches | None,
    progress: bool | None,
) -> Iterator[None]:
    """Within this context, the model is pruned; afterwards it has its dense weights again."""
    try:
        prune(model, config, calibration=calibration, polish_data=polish_data, keep_dense=True, progress=progress)
        yield
    finally:
        if (store := MaskStore.of(model)) is not None:
            store.discard(model)
