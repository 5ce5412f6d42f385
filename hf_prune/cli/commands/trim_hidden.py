"""hf-prune trim-hidden: options, help, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.console import echo
from hf_prune.cli.model_options import MACHINE, SOURCE, UNSEEDED, loads_model
from hf_prune.cli.options import (
    USEFUL,
    AnyText,
    AsJson,
    CalibrationSamples,
    CalibrationSplit,
    Data,
    Model,
    Overwrite,
    read_task,
    task_kind,
)
from hf_prune.cli.startup import check_task_data, start


@loads_model(SOURCE, MACHINE, UNSEEDED)
def trim_hidden(
    model: Model,
    size: Annotated[
        float,
        typer.Option(
            min=0,
            help="How many dimensions of the hidden states stay, such as 512, or which share of them, such as 0.9.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the smaller checkpoint.", show_default=False)],
    data: Data = None,
    text_column: AnyText = None,
    calibration_split: CalibrationSplit = "train",
    calibration_samples: CalibrationSamples = 128,
    window: Annotated[int, typer.Option(min=1, help="Language models: tokens of a window that they see.")] = 512,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Remove dimensions of the hidden states, the same ones in every layer: a smaller model, to be trained after."""
    start([model])
    kind = task_kind(model)
    check_task_data([model], kind, data, labelled=False, why="the choice of dimensions", useful=USEFUL[kind])
    from hf_prune.cli.workflows.trim_hidden import trim_hidden_checkpoint

    task = read_task(kind, data, text_column, None, calibration_split, calibration_samples, window=window)
    assert task is not None  # since there is data
    share = size if size <= 1 or size != int(size) else int(size)
    result = trim_hidden_checkpoint(model, share, out, task, overwrite=overwrite)
    echo(json.dumps(result.to_dict(), indent=2) if as_json else f"{result}\nSaved in {out}.")
