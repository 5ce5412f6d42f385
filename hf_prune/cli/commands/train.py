"""hf-prune train: options, help, and what it prints."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.checkpoint.sources import model_class
from hf_prune.cli.console import echo, resumable
from hf_prune.cli.model_options import loads_model
from hf_prune.cli.options import (
    CLASSES,
    LANGUAGE,
    USEFUL,
    AnyText,
    AsJson,
    Config,
    Data,
    Label,
    Limit,
    Model,
    Overwrite,
    read_task,
    split_names,
)
from hf_prune.cli.panels import criterion_names, one_of
from hf_prune.cli.run_file import pruning_settings, read_run_file, remember, shown_command
from hf_prune.cli.settings import SEED, SELECTION, preset_with, read_config, takes_settings
from hf_prune.cli.startup import check_texts, start
from hf_prune.cli.training_options import (
    BatchSize,
    Bf16,
    Epochs,
    LearningRate,
    Out,
    ReportTo,
    Sparsity,
    TrainSplit,
)
from hf_prune.errors import ConfigError
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.expectations import is_language_model
from hf_prune.planning.presets import TRAINING_EXAMPLES, TRAINING_METHOD_SETTINGS, TRAINING_PRESET
from hf_prune.planning.schedule import Schedule, schedule_names


@loads_model()
@takes_settings(
    out={
        "sparsity": Sparsity,
        **preset_with("best, calibrated on the training split"),
        "criterion": Annotated[
            str | None,
            typer.Option(
                help="How weights are scored, such as magnitude, movement, taylor. [default: of the preset]",
                autocompletion=criterion_names,
            ),
        ],
        **SELECTION,
    },
    config=SEED,
)
def train(
    model: Model,
    out: Out,
    schedule: Annotated[str | None, one_of(schedule_names(), "How the sparsity grows. [default: cubic]")] = None,
    begin: Annotated[
        str | None, typer.Option(help="First update: a step, or a share of all with a dot, such as 0.1. [default: 0.0]")
    ] = None,
    end: Annotated[str | None, typer.Option(help="Last update. [default: 0.7, or the first one for one_shot]")] = None,
    every: Annotated[str | None, typer.Option(help="From one update to the next. [default: 0.01]")] = None,
    keep_masks: Annotated[
        bool, typer.Option("--keep-masks", help="Prune nothing more: train with the masks that the checkpoint has.")
    ] = False,
    shrink_at: Annotated[
        str | None,
        typer.Option(help="Step, or share of all steps, after which pruned heads and neurons are removed."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="A dense model to learn from: a folder, a Hub id, or self for the model before training."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Of the distillation. [default: 2.0]")] = None,
    hidden: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of hidden states in the distillation. [default: 1.0]")
    ] = None,
    task: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of the labels beside a teacher. [default: 0.1]")
    ] = None,
    dropout: Annotated[
        bool, typer.Option("--dropout", help="With --teacher: keep the model's own dropout on, which costs accuracy.")
    ] = False,
    data: Data = None,
    text_column: AnyText = None,
    label_column: Label = None,
    split: TrainSplit = "train",
    score_split: Annotated[
        str | None, typer.Option(help="What it is scored on. [default: validation, or test for language models]")
    ] = None,
    limit: Limit = None,
    window: Annotated[int, typer.Option(min=2, help="Language models: tokens of an example.")] = 256,
    epochs: Epochs = 1.0,
    learning_rate: LearningRate = 5e-5,
    batch_size: BatchSize = 32,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches in an optimizer step.")] = 1,
    bf16: Bf16 = False,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints of the training; continues from the last one there.")
    ] = None,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="Continue there also with another model, data or learning rate."),
    ] = False,
    report_to: ReportTo = None,
    config: Config = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Train a checkpoint while pruning it."""
    moments = {"begin": begin, "end": end, "every": every}
    curve: dict[str, Any] = {key: _read_moment(f"--{key}", text) for key, text in moments.items() if text is not None}
    if schedule is not None:
        curve["name"] = schedule
    weights = {"temperature": temperature, "hidden": hidden, "task": task, "dropout": dropout or None}
    distilled: dict[str, Any] = {key: value for key, value in weights.items() if value is not None}
    in_file = {} if config is None else pruning_settings(read_run_file(config))
    if keep_masks and (curve or (in_file | settings).keys() - SEED.keys()):
        raise ConfigError(
            "--keep-masks prunes nothing more, which contradicts options, or settings in --config, that say what is "
            "pruned"
        )
    if allow_changes and checkpoints is None:
        raise ConfigError("--allow-changes is for a training that goes on: add --checkpoints, or leave it out")
    if distilled and teacher is None:
        raise ConfigError(f"--{', --'.join(distilled)} need a teacher: add --teacher self, or leave them out")
    named = TRAINING_METHOD_SETTINGS & (in_file | settings).keys()
    if not keep_masks and not named and not _exchanges(schedule, in_file):
        settings["preset"] = TRAINING_PRESET
    pruning = None if keep_masks else _with_schedule(read_config(config, **settings), curve)
    start([model, *([teacher] if teacher not in (None, "self") else [])])
    kind = LANGUAGE if is_language_model(model_class(model)) else CLASSES
    if limit is not None and kind == LANGUAGE:
        raise ConfigError("--limit is for classifiers: language models are scored on the whole split, so leave it out")
    check_texts([model], data, labelled=kind == CLASSES, why="a training", useful=USEFUL[kind])
    from hf_prune.cli.workflows.train import TrainingSettings, train_checkpoint
    from hf_prune.training.distillation import Distillation

    samples = TRAINING_EXAMPLES if kind == CLASSES else TRAINING_EXAMPLES // 4  # windows are longer
    model_task = read_task(kind, data, text_column, label_column, split, samples, window=window, limit=limit)
    assert model_task is not None
    keeps = f"The last checkpoint of the training is in {checkpoints}"
    with contextlib.nullcontext() if checkpoints is None else resumable(keeps):
        report = train_checkpoint(
            model,
            pruning,
            out,
            model_task,
            settings=TrainingSettings(
                split=split,
                epochs=epochs,
                learning_rate=learning_rate,
                batch_size=batch_size,
                accumulation=accumulation,
                bf16=bf16,
                seed=pruning.seed if pruning is not None else settings.get("seed", 0),
                report_to=split_names(report_to) if report_to else (),
            ),
            score_split=score_split or model_task.default_split,
            teacher=teacher,
            distillation=None if teacher is None else Distillation(**distilled),
            shrink_at=None if shrink_at is None else _read_moment("--shrink-at", shrink_at),
            checkpoints=checkpoints,
            allow_changes=allow_changes,
            overwrite=overwrite,
            command=shown_command(),
        )
    echo(json.dumps(report.to_dict(), indent=2) if as_json else f"{report}\nSaved in {out}.")


def _exchanges(name: str | None, in_file: Mapping[str, Any]) -> bool:
    """Whether the schedule of the options, or of a file, exchanges weights by magnitude and gradient."""
    schedule = name or in_file.get("schedule")
    return schedule is not None and Schedule.parse(schedule).exchanges


def _with_schedule(config: PruningConfig, curve: dict[str, Any]) -> PruningConfig:
    """A config whose schedule has the settings of the options; cubic, if neither says which."""
    before = {"name": "cubic"} if config.schedule is None else Schedule.parse(config.schedule).to_dict()
    schedule = Schedule.parse({**before, **curve})
    if schedule.initial:  # which is no option
        remember(schedule=schedule.to_dict())
    else:
        remember(schedule=schedule.name, **{name: str(getattr(schedule, name)) for name in ("begin", "end", "every")})
    return config.replace(schedule=schedule)


def _read_moment(option: str, text: str) -> int | float:
    """A number of steps; with a dot, a share of all steps."""
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        raise ConfigError(
            f"{option} is {text!r}: expected a number of steps, such as 500, or a share of all steps, such as 0.1"
        ) from None
