"""hf-prune sweep: options, help, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.interaction import resumable, say_if_continuing, sweep_files
from hf_prune.cli.options import (
    Allocation,
    AsJson,
    BatchSize,
    CalibrationSamples,
    CalibrationSplit,
    Config,
    Data,
    Exclude,
    Granularity,
    Label,
    Model,
    Objective,
    Overwrite,
    Polish,
    Repair,
    Restart,
    Scope,
    Seed,
    Split,
    Steps,
    Targets,
    Text,
    echo,
    read_config,
    split_names,
    split_numbers,
    start,
)
from hf_prune.evaluation.tasks import ClassificationTask


def sweep(
    model: Model,
    sparsity: Annotated[
        str | None,
        typer.Option(help="Shares to remove, separated by commas. [default: 0.3,0.5,0.6,0.7,0.8, or what N:M fixes]"),
    ] = None,
    criterion: Annotated[str, typer.Option(help="Criteria, separated by commas; see: hf-prune list.")] = "magnitude",
    data: Data = "glue/sst2",
    split: Split = "validation",
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.csv and tradeoff.png.")] = Path(
        "hf-prune-sweep"
    ),
    tolerance: Annotated[float, typer.Option(min=0, help="Largest accepted drop, in points of accuracy.")] = 2.0,
    granularity: Granularity = None,
    scope: Scope = None,
    allocation: Allocation = None,
    target_modules: Targets = None,
    exclude_modules: Exclude = None,
    repair: Repair = None,
    objective: Objective = None,
    steps: Steps = None,
    polish: Polish = None,
    seed: Seed = None,
    config: Config = None,
    text_column: Text = "sentence",
    label_column: Label = "label",
    batch_size: BatchSize = 32,
    calibration_split: CalibrationSplit = "train",
    calibration_samples: CalibrationSamples = 128,
    restart: Restart = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Prune at several sparsities, score each, and name the sweet spot; resumes where it was interrupted."""
    sparsities = None if sparsity is None else split_numbers("--sparsity", sparsity)
    start([model], data)
    settings = read_config(
        config,
        granularity=granularity,
        scope=scope,
        allocation=allocation,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        repair=repair,
        objective=objective,
        steps=steps,
        polish=polish,
        seed=seed,
    )
    from hf_prune.cli.workflows.sweep import sweep_checkpoint

    say_if_continuing(out, restart)
    with resumable():
        result = sweep_checkpoint(
            model,
            ClassificationTask(data, split_names(text_column), label_column, calibration_split, calibration_samples),
            out,
            sparsities=sparsities,
            criteria=split_names(criterion),
            config=settings,
            split=split,
            tolerance=tolerance,
            batch_size=batch_size,
            restart=restart,
            overwrite=overwrite,
        )
    echo(json.dumps(result.to_dict(), indent=2) if as_json else f"{result}\n{sweep_files(out)}")
