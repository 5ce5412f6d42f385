"""hf-prune train and hf-prune lottery: pruning while training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.checkpoint.sources import is_language_model, model_class
from hf_prune.cli.options import (
    SST2,
    WIKITEXT,
    Allocation,
    AnyData,
    AnyText,
    AsJson,
    Config,
    Data,
    Exclude,
    Granularity,
    Label,
    Model,
    Overwrite,
    Repair,
    Scope,
    Seed,
    Targets,
    Text,
    check_texts,
    echo,
    read_config,
    read_task,
    split_names,
    start,
)
from hf_prune.errors import ConfigError
from hf_prune.evaluation.tasks import ClassificationTask
from hf_prune.planning.schedule import schedule_names

Out = Annotated[Path, typer.Option(help="Folder for the trained checkpoint.", show_default=False)]
Sparsity = Annotated[float | None, typer.Option(help="Share of the weights removed in the end. [default: 0.5]")]
Split = Annotated[str, typer.Option(help="What it learns from.")]
Score = Annotated[str, typer.Option(help="What it is scored on, before and after.")]
Epochs = Annotated[float, typer.Option(min=0.0, help="Passes over the data.")]
Rate = Annotated[float, typer.Option(min=0.0, help="Highest learning rate of AdamW.")]
Batch = Annotated[int, typer.Option(min=1, help="Sentences, or windows of tokens, in a batch.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")]


def train(
    model: Model,
    out: Out,
    sparsity: Sparsity = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="How weights are scored, such as magnitude, movement, taylor. [default: magnitude]"),
    ] = None,
    granularity: Granularity = None,
    scope: Scope = None,
    allocation: Allocation = None,
    target_modules: Targets = None,
    exclude_modules: Exclude = None,
    repair: Repair = None,
    schedule: Annotated[
        str | None, typer.Option(help=f"{', '.join(schedule_names())}: how the sparsity grows. [default: cubic]")
    ] = None,
    begin: Annotated[
        str | None, typer.Option(help="First update: a step, or a share of all with a dot, such as 0.1. [default: 0.0]")
    ] = None,
    end: Annotated[str | None, typer.Option(help="Last update. [default: 0.7, or the first one for one_shot]")] = None,
    every: Annotated[str | None, typer.Option(help="From one update to the next. [default: 0.01]")] = None,
    keep_masks: Annotated[
        bool, typer.Option("--keep-masks", help="Prune nothing more: train with the masks that the checkpoint has.")
    ] = False,
    shrink_at: Annotated[
        str | None, typer.Option(help="Take pruned heads and neurons out after this step, or share of all steps.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="A dense model to learn from: a folder, a Hub id, or self for the model as it came."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Of the distillation. [default: 2.0]")] = None,
    hidden: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of hidden states in the distillation. [default: 1.0]")
    ] = None,
    task: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of the labels beside a teacher. [default: 0.1]")
    ] = None,
    data: AnyData = None,
    text_column: AnyText = None,
    label_column: Label = "label",
    split: Split = "train",
    score_split: Annotated[
        str | None, typer.Option(help="What it is scored on. [default: validation, or test for language models]")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Language models: tokens of an example.")] = 256,
    epochs: Epochs = 1.0,
    learning_rate: Rate = 5e-5,
    batch_size: Batch = 32,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches in an optimizer step.")] = 1,
    bf16: Bf16 = False,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints of the training; goes on from the last one there.")
    ] = None,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="Go on there also with another model, data or learning rate."),
    ] = False,
    config: Config = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train a checkpoint while it is pruned."""
    pruned = {
        "sparsity": sparsity,
        "criterion": criterion,
        "granularity": granularity,
        "scope": scope,
        "allocation": allocation,
        "target_modules": target_modules,
        "exclude_modules": exclude_modules,
        "repair": repair,
    }
    moments = {"begin": begin, "end": end, "every": every}
    curve = {"name": schedule} | {key: _moment(f"--{key}", text) for key, text in moments.items() if text is not None}
    curve = {key: value for key, value in curve.items() if value is not None}
    wanted = {"temperature": temperature, "hidden": hidden, "task": task}
    learned: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
    if keep_masks and (curve or config is not None or any(value is not None for value in pruned.values())):
        raise ConfigError(
            "--keep-masks prunes nothing more, which contradicts options that say what is pruned, and --config"
        )
    if allow_changes and checkpoints is None:
        raise ConfigError("--allow-changes is for a training that goes on: add --checkpoints, or leave it out")
    if learned and teacher is None:
        raise ConfigError(f"--{', --'.join(learned)} need a teacher: add --teacher self, or leave them out")
    settings = None
    if not keep_masks:
        settings = read_config(config, **pruned, seed=seed)
        before = {"name": "cubic"} if settings.schedule is None else settings.schedule.to_dict()  # type: ignore[union-attr]
        settings = settings.replace(schedule={**before, **curve})
    start([model, *([teacher] if teacher not in (None, "self") else [])])
    of_language = is_language_model(model_class(model))
    source = data or (WIKITEXT if of_language else SST2)
    check_texts([model], source, labelled=not of_language)
    from hf_prune.cli.workflows.train import train_checkpoint
    from hf_prune.cli.workflows.train_settings import TrainingSettings
    from hf_prune.training.distillation import Distillation

    model_task = read_task(of_language, source, text_column, label_column, split, window=window)
    report = train_checkpoint(
        model,
        settings,
        out,
        model_task,
        settings=TrainingSettings(
            split=split,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            accumulation=accumulation,
            bf16=bf16,
            seed=seed or 0,
        ),
        score_split=score_split or model_task.default_split,
        teacher=teacher,
        distillation=None if teacher is None else Distillation(**learned),
        shrink_at=None if shrink_at is None else _moment("--shrink-at", shrink_at),
        checkpoints=checkpoints,
        allow_changes=allow_changes,
        overwrite=overwrite,
    )
    echo(json.dumps(report.to_dict(), indent=2) if as_json else f"{report}\nSaved in {out}.")


def lottery(
    model: Model,
    out: Out,
    sparsity: Sparsity = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often is pruned; each round trains anew.")] = 5,
    rewind_to: Annotated[int, typer.Option(min=0, help="After how many steps the early weights are taken.")] = 0,
    scope: Scope = None,
    target_modules: Targets = None,
    exclude_modules: Exclude = None,
    data: Data = SST2,
    text_column: Text = "sentence",
    label_column: Label = "label",
    split: Split = "train",
    score_split: Score = "validation",
    epochs: Epochs = 1.0,
    learning_rate: Rate = 5e-5,
    batch_size: Batch = 32,
    bf16: Bf16 = False,
    seed: Seed = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Search a lottery ticket: train, prune, go back to early weights, and again."""
    settings = read_config(
        None, sparsity=sparsity, scope=scope, target_modules=target_modules, exclude_modules=exclude_modules, seed=seed
    )
    start([model], data)
    from hf_prune.cli.workflows.lottery import lottery_checkpoint
    from hf_prune.cli.workflows.train_settings import TrainingSettings

    result = lottery_checkpoint(
        model,
        settings,
        out,
        ClassificationTask(data, split_names(text_column), label_column, split),
        settings=TrainingSettings(
            split=split, epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, bf16=bf16, seed=seed or 0
        ),
        score_split=score_split,
        rounds=rounds,
        rewind_to=rewind_to,
        overwrite=overwrite,
    )
    echo(json.dumps(result.to_dict(), indent=2) if as_json else f"{result}\nSaved in {out}.")


def _moment(option: str, text: str) -> int | float:
    """A number of steps, or with a dot a share of all."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ConfigError(
            f"{option} is {text!r}: expected a number of steps, such as 500, or a share of all steps, such as 0.1"
        ) from None
