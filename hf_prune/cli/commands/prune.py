"""hf-prune prune: options, help, and what it prints."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_prune.cli.console import echo, note, resumable, show
from hf_prune.cli.model_options import loads_model
from hf_prune.cli.options import (
    CLASSES,
    LANGUAGE,
    SENTENCES,
    USEFUL,
    AnyText,
    AsJson,
    BatchSize,
    CalibrationSamples,
    CalibrationSplit,
    Config,
    Data,
    Label,
    MaxFlips,
    Model,
    Overwrite,
    read_task,
    task_kind,
)
from hf_prune.cli.prune_checks import check_shrink, refuse_contradictions
from hf_prune.cli.prune_summary import prune_summary, run_facts
from hf_prune.cli.run_file import shown_command
from hf_prune.cli.settings import (
    BUDGETS,
    CRITERION,
    METHOD,
    ROUNDING,
    SEED,
    SELECTION,
    SPARSITY,
    preset_with,
    read_config,
    takes_settings,
)
from hf_prune.cli.startup import check_task_data, start
from hf_prune.errors import ConfigError
from hf_prune.evaluation.tasks import ClassificationTask, LanguageModelingTask
from hf_prune.evaluation.tasks.scored_rows import POLISH_SAMPLES
from hf_prune.planning.presets import METHOD_SETTINGS, expectation
from hf_prune.planning.traits import preset_of

if TYPE_CHECKING:
    from hf_prune.pruning.records import SpeedRecord


@loads_model()
@takes_settings(
    out={**SPARSITY, **preset_with("balanced with --data, fast without")},
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
            help="Instead: the largest share that loses, with 95 % confidence, at most this many points of accuracy, "
            "or of language models per cent of perplexity, measured on held-out texts of the calibration split."
        ),
    ] = None,
    max_flips: MaxFlips = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            help="Instead: the largest size of the weights' file, such as 30MB. Single weights: of a compressed "
            "checkpoint, which is what is saved then; heads, neurons, layers: of a plain one."
        ),
    ] = None,
    held_out: Annotated[
        int,
        typer.Option(min=1, help="For --max-drop, --max-flips: the most sentences, or windows."),
    ] = 2000,
    split: Annotated[
        str | None,
        typer.Option(help="For --max-drop, --max-flips: a split that is only reported. [default: validation, or test]"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Of that split, score only this many sentences, or windows: the first ones."),
    ] = None,
    config: Config = None,
    data: Data = None,
    text_column: AnyText = None,
    label_column: Label = None,
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
            help="Never hold the model: weight by weight, or block by block on the data of the calibration split; "
            "also heads, neurons, experts and layers; resumes where it was interrupted.",
        ),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="With --stream: start from the beginning instead of resuming.")
    ] = False,
    details: Annotated[
        bool, typer.Option("--details", help="Print tables of the layers and their weights, not only the outcome.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Prune a checkpoint and save it as one that plain transformers loads."""
    begin, searches = time.perf_counter(), max_drop is not None or max_flips is not None
    if out is None and not dry_run:
        raise ConfigError("no --out: name the folder for the pruned checkpoint, or pass --dry-run to see the plan")
    refuse_contradictions(
        {
            "--sparsity": "sparsity" in settings,
            "--max-drop": max_drop is not None,
            "--max-flips": max_flips is not None,
            "--target-size": target_size is not None,
            **{f"--{name.replace('_', '-')}": name in settings for name in BUDGETS if name != "workload"},
            "--plots": plots,
            "--stream": stream,
            "--dry-run": dry_run,
            "--polish-samples": polish_samples is not None,
        }
    )
    if limit is not None and not searches:
        raise ConfigError(
            "--limit is of the split that --max-drop and --max-flips report on, and nothing else is scored here: add "
            "one of them, or leave it out"
        )
    if restart and not stream:
        raise ConfigError("--restart is for a streaming run: add --stream, or leave it out")
    start([model])
    chosen = read_config(config, has_data=data is not None, **settings)
    check_shrink(chosen, shrink)
    from hf_prune.planning.plan import sparsity_notes

    for text in [] if searches or dry_run else sparsity_notes(chosen):
        note(text)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if stream:
        from hf_prune.conversion.streaming.streamable import check_streamable

        check_streamable(chosen)
    kind = task_kind(model)
    kind = CLASSES if searches and kind != LANGUAGE else kind
    plan_learns = (chosen.learns_allocation or chosen.learns_units) and not stream
    if (plan_learns if dry_run else chosen.needs_data) or searches:
        from hf_prune.calibration.batches import data_user
        from hf_prune.criteria.base import LABELLED

        with_labels = kind not in (LANGUAGE, SENTENCES) and (searches or bool(chosen.needs & LABELLED))
        budget = f"--max-flips {max_flips:g}" if max_flips is not None else f"--max-drop {max_drop or 0:g}"
        why = budget if searches else data_user(chosen)
        check_task_data([model], kind, data, labelled=with_labels, why=why, useful=USEFUL[kind])
    from hf_prune.cli.workflows.budget import prune_to_budget
    from hf_prune.cli.workflows.prune import plan_checkpoint, prune_checkpoint
    from hf_prune.cli.workflows.stream import stream_checkpoint
    from hf_prune.conversion.streaming.prune_stream import plan_stream
    from hf_prune.utils.distributed import is_main_process

    seen = (calibration_split, calibration_samples)
    task = read_task(kind, data, text_column, label_column, *seen, window=window)
    if out is None or dry_run:
        plan = (
            plan_stream(model, chosen) if stream else plan_checkpoint(model, chosen, task=task, target_size=target_size)
        )
        echo(json.dumps(plan.to_dict(), indent=2) if as_json else str(plan))
        _fail_if_missed(getattr(plan, "speed", None))
        return
    if searches:
        assert isinstance(task, ClassificationTask | LanguageModelingTask)
        split = split or task.default_split
        search, reported, report = prune_to_budget(
            model,
            chosen,
            out,
            task,
            max_drop=max_drop,
            max_flips=max_flips,
            held_out=held_out,
            split=split,
            limit=limit,
            batch_size=batch_size,
            plots=plots,
            overwrite=overwrite,
            command=shown_command(),
        )
        chosen = search.config
        scores = f"{search}\nOn {split}, which had no influence: {reported}\n\n"
        values = {
            "search": search.to_dict(),
            "reported": {"split": split, **reported.to_dict()},
            "report": report.to_dict(),
        }
    else:
        if stream:
            with resumable(f"What was pruned so far is kept beside {out}"):
                more: dict[str, Any] = {"restart": restart, "overwrite": overwrite, "command": shown_command()}
                report = stream_checkpoint(model, chosen, out, task=task, **more)
        else:
            report = prune_checkpoint(
                model,
                chosen,
                out,
                task=task,
                polish_samples=polish_samples,
                plots=plots,
                shrink=shrink,
                target_size=target_size,
                overwrite=overwrite,
                command=shown_command(),
            )
        scores, values = "", report.to_dict()
    if is_main_process():  # of the processes that accelerate launch started
        said: Any = (model, chosen, out, report, time.perf_counter() - begin, data)
        if as_json or details:
            show({**values, "run": run_facts(*said)} if as_json else f"{scores}{report}", as_json, f"Saved in {out}.")
        else:
            echo(f"{scores}{prune_summary(*said)}")
            by_name = config is None and not METHOD_SETTINGS & settings.keys() and preset_of(chosen)
            expected = [expectation(by_name, removes_units=chosen.removes_units)] if by_name else []
            for text in [*report.notes, *expected]:
                note(text)
        if target_size is not None:
            _check_size(out, target_size)
    _fail_if_missed(None if report.structure is None else report.structure.speed)


def _check_size(out: Path, target_size: str) -> None:
    """Say how large the weights are, and end with exit code 1 if that is more than was asked for."""
    from hf_prune.checkpoint.target_size import size_in_bytes
    from hf_prune.conversion.compression import weights_size

    size = weights_size(out)
    echo(f"The weights take {size / 1e6:.1f} MB on disk; {target_size} were asked for.", err=True)
    if size > size_in_bytes(target_size):
        raise typer.Exit(1)


def _fail_if_missed(speed: SpeedRecord | None) -> None:
    """End with exit code 1 if the speed-up that was asked for was not reached."""
    if speed is not None and speed.missed:
        echo(f"error: {speed.missed}", err=True)
        raise typer.Exit(1)
