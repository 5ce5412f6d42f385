"""hf-prune sweep: options, help, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.cli.console import echo, resumable, say_if_continuing
from hf_prune.cli.model_options import loads_model
from hf_prune.cli.options import (
    LANGUAGE,
    USEFUL,
    AnyText,
    AsJson,
    BatchSize,
    CalibrationSamples,
    CalibrationSplit,
    Config,
    Data,
    Label,
    Limit,
    MaxFlips,
    Metric,
    Model,
    Overwrite,
    Restart,
    Split,
    read_task,
    split_names,
    split_numbers,
    task_kind,
)
from hf_prune.cli.panels import criterion_names
from hf_prune.cli.run_file import remember
from hf_prune.cli.settings import METHOD, SEED, SELECTION, preset_with, read_config, takes_settings
from hf_prune.cli.startup import check_task_data, start
from hf_prune.cli.timing_options import Batch, Length, Threads, given_workload
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.tasks import ClassificationTask, ExampleTask, SentenceTask
from hf_prune.evaluation.tasks.raw import NO_TASK


@loads_model()
@takes_settings(
    criterion=preset_with("fast, unless --criterion says otherwise"),
    tolerance={**SELECTION, **METHOD, **SEED},
)
def sweep(
    model: Model,
    sparsity: Annotated[
        str | None,
        typer.Option(help="Shares to remove, separated by commas. [default: 0.3,0.5,0.6,0.7,0.8, or what N:M fixes]"),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="Criteria, separated by commas; see: hf-prune list. [default: that of --preset or --config, or "
            "magnitude]",
            autocompletion=criterion_names,
        ),
    ] = None,
    data: Data = None,
    split: Split = "validation",
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.csv and pictures.")] = Path(
        "hf-prune-sweep"
    ),
    tolerance: Annotated[float, typer.Option(min=0, help="Largest accepted drop, in points.")] = 2.0,
    max_flips: MaxFlips = None,
    accelerate: Annotated[
        bool,
        typer.Option(
            "--accelerate", help="Also measure how many times as fast each is on the fastest CPU kernels; speed.png."
        ),
    ] = False,
    batch: Batch = None,
    length: Length = None,
    threads: Threads = None,
    config: Config = None,
    text_column: AnyText = None,
    label_column: Label = None,
    metric: Metric = None,
    limit: Limit = None,
    batch_size: BatchSize = 32,
    calibration_split: CalibrationSplit = "train",
    calibration_samples: CalibrationSamples = 128,
    restart: Restart = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Prune at several sparsities, score each, and name the sweet spot; resumes where it was interrupted."""
    sparsities = None if sparsity is None else split_numbers("--sparsity", sparsity)
    workload = given_workload(batch, length, threads)
    if workload and not accelerate:
        raise ConfigError("--batch, --length and --threads say what --accelerate times: add it, or leave them out")
    kind = task_kind(model, metric)
    kind = "language-modeling" if kind == LANGUAGE else kind
    start([model])
    named = {"why": "a sweep", "useful": USEFUL[kind]}
    source = check_task_data([model], kind, data, labelled=kind != "language-modeling", **named)
    chosen = read_config(config, options=("sparsity", "criterion"), **settings)
    from hf_prune.cli.workflows.sweep import sweep_checkpoint

    seen = (calibration_split, calibration_samples)
    task = read_task(kind, source, text_column, label_column, *seen, metric=metric, limit=limit)
    if not isinstance(task, ClassificationTask | SentenceTask | ExampleTask):
        raise DataError(f"{model!r} has no task that is scored: {NO_TASK}")
    say_if_continuing(out, restart, "dense")
    criteria = (chosen.criterion,) if criterion is None else split_names(criterion)
    remember(criterion=",".join(criteria))
    with resumable(f"The scores so far are in {out}"):
        result = sweep_checkpoint(
            model,
            task,
            out,
            sparsities=sparsities,
            criteria=criteria,
            config=chosen,
            split=split,
            tolerance=tolerance,
            max_flips=max_flips,
            accelerate=workload if accelerate else False,
            batch_size=batch_size,
            restart=restart,
            overwrite=overwrite,
        )
    saved = ", ".join(str(out / name) for name in result.file_names)
    echo(json.dumps(result.to_dict(), indent=2) if as_json else f"{result}\nSaved: {saved}")
