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
from hf_prune.cli.workflows.loading import join_processes, load_for_task
from hf_prune.criteria.base import LABELLED
from hf_prune.errors import ConfigError
from hf_prune.evaluation.accuracy import evaluate_classification
from hf_prune.evaluation.accuracy_result import Evaluation
from hf_prune.evaluation.comparison import Comparison, compare
from hf_prune.evaluation.data.checks import check_columns
from hf_prune.evaluation.data.classification import class_numbers
from hf_prune.evaluation.data.files import refuse_same_split
from hf_prune.evaluation.plots import write_plots
from hf_prune.evaluation.sparsity_report import SparsityReport, sparsity_report
from hf_prune.evaluation.sparsity_search import SparsitySearch, check_budget, find_sparsity
from hf_prune.evaluation.structure_report import structure_report
from hf_prune.evaluation.tasks import ClassificationTask, Task
from hf_prune.evaluation.weight_statistics import weight_histogram
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.plan import PruningPlan
from hf_prune.planning.traits import shrinks_by_default
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.utils.distributed import fail_together, is_main_process
from hf_prune.utils.files import write_json, write_text
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
    overwrite: bool = False,
) -> SparsityReport:
    """Prune a checkpoint into a folder: weights, masks, tokenizer, report and, if asked for, plots.

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
        overwrite: Replace what is in the way in ``out``.

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
    pruned = _pruned_into(
        out,
        sole_model(model),
        config,
        batches,
        polish_data,
        source=source,
        plots=plots,
        name=name,
        shrink=shrink,
        overwrite=overwrite,
    )
    with pruned as (report, _):
        return report


def plan_checkpoint(source: str, config: PruningConfig, *, task: Task | None = None) -> PruningPlan | UnitPlan:
    """The plan for a checkpoint; see :meth:`hf_prune.PrunedModelMixin.plan`.

    Args:
        source: Folder or Hub id.
        config: The settings.
        task: Texts, for choices that are learned from data.
    """
    learns = config.learns_allocation or config.learns_units
    model, _, batches = _with_calibration(source, task if learns else None, config)
    plan: PruningPlan | UnitPlan = model.plan(config, calibration=batches)
    return plan


def _with_calibration(
    source: str, task: Task | None, config: PruningConfig
) -> tuple[Any, Any, list[dict[str, Any]] | None]:
    """A model, and where there is a task its tokenizer and its calibration batches."""
    if task is None:
        return load_native(source), None, None
    model, tokenizer = load_for_task(source, task, labelled=bool(config.needs & LABELLED))
    return model, tokenizer, task.calibration_batches([config], model, tokenizer)


@writes_alone("prune")
@reported()
def prune_to_budget(
    source: str,
    config: PruningConfig,
    out: Path,
    task: ClassificationTask,
    *,
    max_drop: float,
    held_out: int = 2000,
    split: str = "validation",
    batch_size: int = 32,
    plots: bool = False,
    name: str = "",
    overwrite: bool = False,
) -> tuple[SparsitySearch, Comparison, SparsityReport]:
    """Prune a checkpoint as far as a drop in accuracy allows, and save it as :func:`prune_checkpoint` does.

    The sparsity is found on sentences of the calibration split that neither calibration nor a polish sees; see
    :func:`hf_prune.find_sparsity`. A polish trains on up to 4,096 others, without their labels. The score on the
    other split is only reported.

    Args:
        source: Folder or Hub id of a dense sequence classifier.
        config: All settings but the sparsity.
        out: The folder: new, empty, or an earlier output.
        task: Labelled texts.
        max_drop: Largest accepted drop, in points of accuracy.
        held_out: How many sentences the search scores.
        split: The split whose score is reported.
        batch_size: Examples scored at once.
        plots: Also write ``weights.png`` and ``layers.png``.
        name: Name of the model in plots.
        overwrite: Replace what is in the way in ``out``.

    Returns:
        The search and the comparison on ``split``, also written to ``sparsity_search.json``, and the report.

    Raises:
        BudgetError: If no sparsity is within the budget; then nothing is written.
        CheckpointError: If ``out`` is the source, or something is in the way.
    """
    check_output(out, "prune", [source], overwrite=overwrite)
    check_budget(config, max_drop)
    why = "a model looks better than it is on the sentences that its sparsity was chosen on"
    refuse_same_split(task.source, split, task.calibration_split, "searched and reported on", why)
    join_processes()
    model, tokenizer = load_for_task(source, task)
    options: dict[str, Any] = {"source": display_name(task.source), "batch_size": batch_size, **task.columns}
    final_data = task.load(split)
    check_columns(final_data, [*task.text_columns, task.label_column], f"the split {split!r}")
    class_numbers(task.load(task.calibration_split), task.label_column, model)  # raises, naming rows of the data
    seen = task.samples_seen(config, held_out)
    batches = task.calibration_batches([config], model, tokenizer)
    polish_data = task.polish_batches([config], model, tokenizer, seen)
    search = find_sparsity(
        model,
        tokenizer,
        task.held_out(held_out, seen),
        max_drop=max_drop,
        config=config,
        calibration=batches,
        polish_data=polish_data,
        progress=is_main_process(),
        split=task.calibration_split,
        **options,
    )

    def score(title: str) -> Evaluation:
        return evaluate_classification(
            model, tokenizer, final_data, split=split, progress=is_main_process() and title, **options
        )

    dense = score(f"dense, {split}")
    pruned = _pruned_into(
        out,
        model,
        search.config,
        batches,
        polish_data,
        source=source,
        plots=plots,
        name=name,
        overwrite=overwrite,
    )
    with pruned as (report, staging):
        comparison = compare(dense, score(f"pruned, {split}"))
        if staging is not None:
            values = {**search.to_dict(), "reported": {"split": split, **comparison.to_dict()}}
            write_json(staging / "sparsity_search.json", values)
    return search, comparison, report


@contextlib.contextmanager
def _pruned_into(
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
            model.save_pretrained(staging)
            copy_companions(source, staging)
            write_text(staging / "sparsity_report.json", report.to_json())
            if after is not None:
                try:
                    write_plots(staging, report, before, after, name or display_name(source))
                except Exception as error:  # whatever fails while drawing: a plot is not worth losing the checkpoint
                    warn_user(f"no plots, since drawing them failed ({type(error).__name__}: {error})")
        yield report, staging
