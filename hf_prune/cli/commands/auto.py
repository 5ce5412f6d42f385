"""hf-prune auto: options, help, and what it prints."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.cli.console import echo, note, resumable, say_if_continuing
from hf_prune.cli.model_options import Seed, loads_model
from hf_prune.cli.options import (
    LANGUAGE,
    RAW,
    USEFUL,
    AnyText,
    AsJson,
    BatchSize,
    CalibrationSamples,
    CalibrationSplit,
    Label,
    MaxFlips,
    Metric,
    Model,
    Overwrite,
    Restart,
    read_task,
    split_names,
    task_kind,
)
from hf_prune.cli.panels import one_of
from hf_prune.cli.run_file import shown_command
from hf_prune.cli.settings import read_workload
from hf_prune.cli.startup import check_task_data, start
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.tasks.raw import NO_TASK

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


@loads_model()
def auto(
    model: Model,
    data: Annotated[
        str,
        typer.Option(help="A folder with train/dev files or images, a file, or a Hub data set.", show_default=False),
    ],
    goal: Annotated[
        str,
        one_of(
            ("faster", "smaller", "sparser"),
            "faster: heads and neurons go, timed here; smaller: zeros, in a compressed file; sparser: zeros.",
        ),
    ] = "faster",
    out: Annotated[
        Path, typer.Option(help="Folder for results.json, results.csv, tradeoff.png and the checkpoint, model/.")
    ] = Path("hf-prune-auto"),
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="The largest accepted loss, shown with 95 % confidence: points of the metric, which are hundredths, "
            "or per cent of perplexity. [default: 1, or 5 for language models]"
        ),
    ] = None,
    max_flips: MaxFlips = None,
    time_limit: Annotated[
        str | None, typer.Option(help="No further candidate is begun after this time: 90s, 10m, 2h. [default: none]")
    ] = None,
    presets: Annotated[
        str,
        typer.Option(
            help="Those that are tried, cheapest first; settings that they share are tried once. "
            "See: hf-prune list presets."
        ),
    ] = "fast,balanced,best",
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform", help="Also try equal sizes in all layers, which plain transformers loads; for --goal faster."
        ),
    ] = False,
    held_out: Annotated[
        int, typer.Option(min=1, help="The most examples, queries or windows to score candidates on.")
    ] = 4000,
    split: Annotated[
        str | None,
        typer.Option(help="A split whose score is only reported. [default: validation, or test, if there is one]"),
    ] = None,
    workload: Annotated[
        str | None, typer.Option(help="--goal faster: batch size x tokens that are timed. [default: 1x128]")
    ] = None,
    text_column: AnyText = None,
    label_column: Label = None,
    metric: Metric = None,
    calibration_split: CalibrationSplit = "train",
    calibration_samples: CalibrationSamples = 128,
    window: Annotated[int, typer.Option(min=2, help="Language models: tokens of a window.")] = 512,
    batch_size: BatchSize = 32,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of PyTorch, also while times are measured. [default: its own]")
    ] = None,
    seed: Seed = None,
    restart: Restart = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Find the best pruning for a goal: try presets, cheapest first, measure each, save the best within a drop."""
    seconds = None if time_limit is None else _seconds(time_limit)
    start([model])
    kind = task_kind(model, metric)
    if kind == RAW:
        raise DataError(f"{model!r} has no task that is scored: {NO_TASK}")
    if kind == LANGUAGE and metric is not None:
        raise ConfigError(
            f"--metric is {metric!r}, and {model!r} is a language model, scored by perplexity: leave it out"
        )
    check_task_data([model], kind, data, labelled=kind != LANGUAGE, why="a search", useful=USEFUL[kind])
    logging.getLogger("hf_prune").setLevel(logging.INFO)
    from hf_prune.cli.workflows.loading import load_for_task
    from hf_prune.evaluation.data.loading import has_split
    from hf_prune.search.run import auto_prune
    from hf_prune.utils.formatting import display_name
    from hf_prune.utils.output_folder import check_output

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    seen = (calibration_split, calibration_samples)
    task: Any = read_task(kind, data, text_column, label_column, *seen, window=window, metric=metric)
    check_output(out, "auto", [model], overwrite=True)  # auto_prune checks what is in it
    say_if_continuing(out, restart, "goal")
    if split is None and has_split(task.source, task.default_split):
        split = task.default_split
    elif split is None:
        note(
            f"{data} has no split {task.default_split!r}: the card gets the score on held-out data, on which the model "
            f"was chosen; name another split with --split"
        )
    loaded, tokenizer = load_for_task(model, task)
    with resumable(f"What was measured so far is in {out}, and the best so far in {out / 'model'}"):
        result = auto_prune(
            loaded,
            tokenizer,
            task,
            out,
            goal=goal,
            max_drop=5.0 if kind == LANGUAGE and max_drop is None and max_flips is None else max_drop,
            max_flips=max_flips,
            time_limit=seconds,
            presets=split_names(presets),
            uniform=uniform,
            held_out=held_out,
            split=split,
            seed=seed or 0,
            workload=None if workload is None else read_workload(workload),
            restart=restart,
            overwrite=overwrite,
            name=display_name(model),
            base_model=model,
            command=shown_command(),
            progress=True,
            batch_size=1 if kind == LANGUAGE else batch_size,
        )
    echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
    if result.best is None:
        raise typer.Exit(1)


def _seconds(text: str) -> float:
    """A time such as ``90s``, ``10m`` or ``2h`` in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None:
        raise ConfigError(f"--time-limit is {text!r}: expected a time such as 90s, 10m or 2h")
    return float(found[1]) * _UNITS[found[2]]
