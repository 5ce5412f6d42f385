"""hf-prune sweep: options, help, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.cli.console import echo, resumable, say_if_continuing, sweep_files
from hf_prune.cli.options import (
    CLASSES,
    DATA,
    SENTENCES,
    AnyData,
    AnyText,
    AsJson,
    BatchSize,
    CalibrationSamples,
    CalibrationSplit,
    Config,
    Label,
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
from hf_prune.cli.settings import METHOD, SEED, SELECTION, read_config, takes_settings
from hf_prune.cli.startup import start
from hf_prune.evaluation.data.sources import check_data_source
from hf_prune.evaluation.tasks import LanguageModelingTask


@takes_settings(tolerance={**SELECTION, **METHOD, **SEED})
def sweep(
    model: Model,
    sparsity: Annotated[
        str | None,
        typer.Option(help="Shares to remove, separated by commas. [default: 0.3,0.5,0.6,0.7,0.8, or what N:M fixes]"),
    ] = None,
    criterion: Annotated[str, typer.Option(help="Criteria, separated by commas; see: hf-prune list.")] = "magnitude",
    data: AnyData = None,
    split: Split = "validation",
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.csv and tradeoff.png.")] = Path(
        "hf-prune-sweep"
    ),
    tolerance: Annotated[float, typer.Option(min=0, help="Largest accepted drop, in points.")] = 2.0,
    config: Config = None,
    text_column: AnyText = None,
    label_column: Label = "label",
    metric: Metric = None,
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
    kind = SENTENCES if task_kind(model, metric) == SENTENCES else CLASSES
    source = data or DATA[kind]
    start([model], source if kind == CLASSES else None)
    if kind == SENTENCES:
        check_data_source(source)
    chosen = read_config(config, **settings)
    from hf_prune.cli.workflows.sweep import sweep_checkpoint

    seen = (calibration_split, calibration_samples)
    task = read_task(kind, source, text_column, label_column, *seen, metric=metric)
    assert not isinstance(task, LanguageModelingTask)
    say_if_continuing(out, restart)
    with resumable():
        result = sweep_checkpoint(
            model,
            task,
            out,
            sparsities=sparsities,
            criteria=split_names(criterion),
            config=chosen,
            split=split,
            tolerance=tolerance,
            batch_size=batch_size,
            restart=restart,
            overwrite=overwrite,
        )
    echo(json.dumps(result.to_dict(), indent=2) if as_json else f"{result}\n{sweep_files(out)}")
