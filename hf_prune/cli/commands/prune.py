"""hf-prune prune: options, help, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.cli.console import echo, resumable
from hf_prune.cli.options import (
    CLASSES,
    DATA,
    AnyData,
    AnyText,
    AsJson,
    BatchSize,
    CalibrationSamples,
    CalibrationSplit,
    Config,
    Label,
    Model,
    Overwrite,
    read_task,
    task_kind,
)
from hf_prune.cli.settings import (
    BUDGETS,
    CRITERION,
    METHOD,
    ROUNDING,
    SEED,
    SELECTION,
    SPARSITY,
    read_config,
    takes_settings,
)
from hf_prune.cli.startup import check_texts, start
from hf_prune.errors import ConfigError
from hf_prune.evaluation.tasks import ClassificationTask
from hf_prune.evaluation.tasks.classification import POLISH_SAMPLES
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.traits import can_shrink


@takes_settings(
    out=SPARSITY,
    split={**CRITERION, **SELECTION, **METHOD, **SEED},
    dry_run=BUDGETS,
    threads=ROUNDING,
)
def prune(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Folder for the pruned checkpoint.", show_default=False)] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Instead: the largest share whose drop in accuracy is, with 95 % confidence, at most this many "
            "points, measured on held-out sentences of the calibration split."
        ),
    ] = None,
    held_out: Annotated[int, typer.Option(min=1, help="With --max-drop: how many sentences that is.")] = 2000,
    split: Annotated[str, typer.Option(help="With --max-drop: a split whose score is only reported.")] = "validation",
    config: Config = None,
    data: AnyData = None,
    text_column: AnyText = None,
    label_column: Label = "label",
    calibration_split: CalibrationSplit = "train",
    calibration_samples: CalibrationSamples = 128,
    window: Annotated[
        int, typer.Option(min=1, help="Language models: tokens of a window that they see while calibrating.")
    ] = 512,
    polish_samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"How many a polish trains on. [default: {POLISH_SAMPLES} labelled texts, or the windows of "
            "calibration]",
        ),
    ] = None,
    batch_size: BatchSize = 32,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of PyTorch, also while times are measured. [default: its own]")
    ] = None,
    shrink: Annotated[
        bool | None,
        typer.Option(
            "--shrink/--no-shrink",
            help="Remove what was pruned as a whole from the model, or leave it in, as masks and zeros. "
            "[default: heads, neurons and layers are removed; rows, columns and channels stay]",
            show_default=False,
        ),
    ] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Also write weights.png and layers.png.")] = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Never hold the model: weight by weight, or block by block on the texts of the calibration split; "
            "resumes where it was interrupted.",
        ),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="With --stream: start from the beginning instead of resuming.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Prune a checkpoint and save it as one that plain transformers loads."""
    searches = max_drop is not None
    if out is None and not dry_run:
        raise ConfigError("no --out: name the folder for the pruned checkpoint, or pass --dry-run to see the plan")
    _refuse_contradictions(
        {
            "--sparsity": "sparsity" in settings,
            "--max-drop": searches,
            "--plots": plots,
            "--stream": stream,
            "--dry-run": dry_run,
            "--polish-samples": polish_samples is not None,
        }
    )
    if restart and not stream:
        raise ConfigError("--restart is for a streaming run: add --stream, or leave it out")
    start([model])
    chosen = read_config(config, **settings)
    _check_shrink(chosen, shrink)
    from hf_prune.planning.plan import sparsity_notes

    for note in [] if searches or dry_run else sparsity_notes(chosen):
        echo(f"note: {note}", err=True)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if stream:
        from hf_prune.conversion.streaming.prune_stream import check_streamable

        check_streamable(chosen)
    kind = CLASSES if searches else task_kind(model)
    plan_learns = chosen.learns_allocation or chosen.learns_units
    if (plan_learns if dry_run else chosen.needs_data) or searches:
        from hf_prune.criteria.base import LABELLED

        with_labels = searches or (kind == CLASSES and bool(chosen.needs & LABELLED))
        check_texts([model], data or DATA[kind], labelled=with_labels)
    from hf_prune.cli.workflows.prune import plan_checkpoint, prune_checkpoint, prune_to_budget
    from hf_prune.cli.workflows.stream import stream_checkpoint
    from hf_prune.conversion.streaming.prune_stream import plan_stream
    from hf_prune.utils.distributed import is_main_process

    seen = (calibration_split, calibration_samples)
    task = read_task(kind, data, text_column, label_column, *seen, window=window)
    if out is None or dry_run:
        plan = plan_stream(model, chosen) if stream else plan_checkpoint(model, chosen, task=task)
        echo(json.dumps(plan.to_dict(), indent=2) if as_json else str(plan))
        return
    if max_drop is not None:
        assert isinstance(task, ClassificationTask)
        search, reported, report = prune_to_budget(
            model,
            chosen,
            out,
            task,
            max_drop=max_drop,
            held_out=held_out,
            split=split,
            batch_size=batch_size,
            plots=plots,
            overwrite=overwrite,
        )
        text = f"{search}\nOn {split}, which had no influence: {reported}\n\n{report}"
        values = {
            "search": search.to_dict(),
            "reported": {"split": split, **reported.to_dict()},
            "report": report.to_dict(),
        }
    else:
        if stream:
            with resumable():
                report = stream_checkpoint(model, chosen, out, task=task, restart=restart, overwrite=overwrite)
        else:
            report = prune_checkpoint(
                model,
                chosen,
                out,
                task=task,
                polish_samples=polish_samples,
                plots=plots,
                shrink=shrink,
                overwrite=overwrite,
            )
        text, values = str(report), report.to_dict()
    if is_main_process():  # of the processes that accelerate launch started
        echo(json.dumps(values, indent=2) if as_json else f"{text}\nSaved in {out}.")


def _refuse_contradictions(given: dict[str, bool]) -> None:
    """Refuse options that contradict one another: ``given`` says of each whether it is there."""
    for option in ("--sparsity", "--dry-run"):
        if given["--max-drop"] and given[option]:
            raise ConfigError(f"--max-drop finds the sparsity by measuring, which contradicts {option}: leave one out")
    for option in ("--max-drop", "--plots"):
        if given["--stream"] and given[option]:
            raise ConfigError(f"--stream never holds the model, which {option} needs: leave one out")
    for option in ("--max-drop", "--stream", "--dry-run"):
        if given["--polish-samples"] and given[option]:
            raise ConfigError(f"--polish-samples has no meaning with {option}: leave one out")


def _check_shrink(config: PruningConfig, shrink: bool | None) -> None:
    if shrink is not None and not can_shrink(config):
        raise ConfigError(
            f"--shrink and --no-shrink are for head, neuron, layer, row, column and channel, not for granularity "
            f"{config.granularity!r}: leave them out"
        )
