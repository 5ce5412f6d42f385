"""Prune a checkpoint into a folder."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.auto import load_native
from hf_prune.checkpoint.companions import copy_companions
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.checkpoint.target_size import with_target_size
from hf_prune.cli.workflows.card import write_run_card
from hf_prune.cli.workflows.loading import join_processes, load_for_task
from hf_prune.criteria.base import LABELLED
from hf_prune.errors import ConfigError
from hf_prune.evaluation.plots import write_plots
from hf_prune.evaluation.sparsity_report import SparsityReport, sparsity_report
from hf_prune.evaluation.structure_report import structure_report
from hf_prune.evaluation.tasks import Task
from hf_prune.evaluation.weight_statistics import weight_histogram
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.plan import PruningPlan
from hf_prune.planning.traits import shrinks_by_default
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.utils.distributed import fail_together, is_main_process
from hf_prune.utils.files import write_text
from hf_prune.utils.formatting import display_name
from hf_prune.utils.locks import writes_alone
from hf_prune.utils.notices import reported, warn_user
from hf_prune.utils.output_folder import check_output
from hf_prune.utils.wrapping import sole_model


@writes_alone("prune")
@reported()
def prune_checkpoint(
    source: str,
    config: PruningConfig,
    out: Path,
    *,
    task: Task | None = None,
    polish_samples: int | None = None,
    plots: bool = False,
    name: str = "",
    shrink: bool | None = None,
    target_size: str | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> SparsityReport:
    """Prune a checkpoint into a folder: weights, masks, tokenizer, report, card and, if asked for, plots.

    Args:
        source: Folder or Hub id.
        config: The settings.
        out: The folder: new, empty, or an earlier output.
        task: Labelled texts, or texts for a language model, for criteria that need them.
        polish_samples: How many of them a polish trains on; by default 4,096 labelled texts (without their labels), or
            the windows that calibration sees. Those of calibration are among them.
        plots: Also write ``weights.png`` and ``layers.png``.
        name: Name of the model in plots.
        shrink: Remove what was pruned as a whole from the model, or leave it in, masked. None: remove heads, neurons
            and layers.
        target_size: In place of a sparsity, see :func:`hf_prune.prune`; where single weights go, the checkpoint is
            saved compressed.
        overwrite: Replace what is in the way in ``out``.
        command: The command line, for the card.

    Returns:
        The report, which is also written to ``sparsity_report.json`` in the folder.

    Raises:
        CheckpointError: If ``out`` is the source, or something is in the way.
    """
    check_output(out, "prune", [source], overwrite=overwrite)
    join_processes()
    if polish_samples is not None and config.polish is None:
        raise ConfigError(f"polish_samples is {polish_samples}, but there is no polish: set polish, or leave it out")
    task = task if config.needs_data else None
    model, tokenizer, batches = _with_calibration(source, task, config)
    polish_data = None if task is None else task.polish_batches([config], model, tokenizer, polish_samples)
    if target_size is not None:
        config = with_target_size(sole_model(model), config, target_size)
    pruned = pruned_into(
        out,
        sole_model(model),
        config,
        batches,
        polish_data,
        source=source,
        plots=plots,
        name=name,
        shrink=shrink,
        compressed=target_size is not None and not config.removes_units,
        overwrite=overwrite,
    )
    with pruned as (report, staging):
        if staging is not None:
            write_run_card(staging, out, source, config, task, command=command)
    return report


def plan_checkpoint(
    source: str, config: PruningConfig, *, task: Task | None = None, target_size: str | None = None
) -> PruningPlan | UnitPlan:
    """The plan for a checkpoint; see :meth:`hf_prune.PrunedModelMixin.plan`.

    Args:
        source: Folder or Hub id.
        config: The settings.
        task: Texts, for choices that are learned from data.
        target_size: See :func:`prune_checkpoint`.
    """
    learns = config.learns_allocation or config.learns_units
    model, _, batches = _with_calibration(source, task if learns else None, config)
    plan: PruningPlan | UnitPlan = model.plan(config, calibration=batches, target_size=target_size)
    return plan


def _with_calibration(
    source: str, task: Task | None, config: PruningConfig
) -> tuple[Any, Any, list[dict[str, Any]] | None]:
    """A model, and where there is a task its tokenizer and its calibration batches."""
    if task is None:
        return load_native(source), None, None
    model, tokenizer = load_for_task(source, task, labelled=bool(config.needs & LABELLED))
    return model, tokenizer, task.calibration_batches([config], model, tokenizer)


@contextlib.contextmanager
def pruned_into(
    out: Path,
    model: Any,
    config: PruningConfig,
    calibration: list[dict[str, Any]] | None,
    polish_data: list[dict[str, Any]] | None,
    *,
    source: str,
    plots: bool,
    name: str,
    shrink: bool | None = None,
    compressed: bool = False,
    overwrite: bool = False,
) -> Iterator[tuple[SparsityReport, Path | None]]:
    """Prune and save; the block may add files to the folder, which then appears at once.

    Of several processes only the first one writes; the others get no folder, and wait.
    """
    shrinks = shrinks_by_default(config) if shrink is None else shrink
    if shrinks:
        find_unit_groups(model)  # raises before any work
    plan = model.plan(config)
    names = [t.target.name for t in plan.tensors] if isinstance(plan, PruningPlan) else plan.weights
    dense, before = sparsity_report(model, config), weight_histogram(model, names)
    model.prune(config, calibration=calibration, polish_data=polish_data, progress=True)
    report = sparsity_report(model).with_before(dense)
    after = weight_histogram(model, names, limit=float(before.edges[-1])) if plots else None
    if shrinks:
        report = dataclasses.replace(report, structure=structure_report(model.shrink()))
    writes = staged_checkpoint(out, "prune", overwrite=overwrite) if is_main_process() else contextlib.nullcontext()
    with fail_together(), writes as staging:
        if staging is not None:
            model.save_pretrained(staging, compressed=compressed)
            copy_companions(source, staging)
            write_text(staging / "sparsity_report.json", report.to_json())
            if after is not None:
                try:
                    write_plots(staging, report, before, after, name or display_name(source))
                except Exception as error:  # whatever fails while drawing: a plot is not worth losing the checkpoint
                    warn_user(f"no plots, since drawing them failed ({type(error).__name__}: {error})")
        yield report, staging
