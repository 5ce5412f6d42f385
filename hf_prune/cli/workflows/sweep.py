"""Sweep over a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_prune.cli.workflows.loading import load_for_task
from hf_prune.evaluation.data.files import refuse_same_split
from hf_prune.evaluation.sweep import run_sweep
from hf_prune.evaluation.sweep_result import SweepResult
from hf_prune.evaluation.tasks import ClassificationTask, ExampleTask, SentenceTask
from hf_prune.planning.config import PruningConfig
from hf_prune.utils.formatting import display_name
from hf_prune.utils.locks import writes_alone
from hf_prune.utils.output_folder import check_output


@writes_alone("sweep")
def sweep_checkpoint(
    source: str,
    task: ClassificationTask | SentenceTask | ExampleTask,
    out: Path,
    *,
    sparsities: Sequence[float] | None = None,
    criteria: Sequence[str] = ("magnitude",),
    config: PruningConfig | None = None,
    split: str = "validation",
    tolerance: float = 2.0,
    max_flips: float | None = None,
    accelerate: bool | Mapping[str, int] = False,
    batch_size: int = 32,
    restart: bool = False,
    name: str = "",
    data_name: str = "",
    overwrite: bool = False,
) -> SweepResult:
    """Sweep over a checkpoint; see :func:`hf_prune.run_sweep`.

    Args:
        source: Folder or Hub id of a dense sequence classifier, or of a model of sentence-transformers.
        task: What to score and calibrate on.
        out: Folder for the results.
        sparsities: Shares to remove; see :func:`hf_prune.run_sweep` for the default.
        criteria: Names of criteria.
        config: All other settings.
        split: The split to score.
        tolerance: Largest accepted drop, in points.
        max_flips: Instead, for classifiers: the largest share of answers that may change, in percent.
        accelerate: Also measure speed-ups on the fastest kernels; see :func:`hf_prune.run_sweep`.
        batch_size: Examples scored at once.
        restart: Measure everything again.
        name: Name of the model in tables and plots.
        data_name: Name of the data there.
        overwrite: Replace results of other settings, or from another source, in ``out``.
    """
    check_output(out, "sweep", [source], overwrite=True)  # run_sweep checks what is in it
    configs = [(config or PruningConfig()).replace(criterion=name) for name in criteria]
    if any(candidate.needs_data for candidate in configs):
        why = "a criterion that has seen the labels that it is scored on looks better than it is"
        refuse_same_split(task.source, split, task.calibration_split, "scored and calibrated on", why)
    model, tokenizer = load_for_task(source, task)
    return run_sweep(
        model,
        tokenizer,
        task.load_scored(split),
        sparsities=sparsities,
        criteria=criteria,
        config=config,
        calibration=task.calibration_batches(configs, model, tokenizer),
        polish_data=task.polish_batches(configs, model, tokenizer),
        tolerance=tolerance,
        max_flips=max_flips,
        accelerate=accelerate,
        out=out,
        restart=restart,
        name=name or display_name(source),
        source=data_name or display_name(task.source),
        split=split,
        progress=True,
        **task.columns,
        batch_size=batch_size,
        overwrite=overwrite,
    )
