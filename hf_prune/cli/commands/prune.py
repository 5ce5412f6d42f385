"""hf-prune prune: options, help, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_prune.checkpoint.sources import is_language_model, model_class
from hf_prune.cli.interaction import resumable
from hf_prune.cli.options import (
    SST2,
    WIKITEXT,
    Allocation,
    AnyData,
    AnyText,
    AsJson,
    BatchSize,
    CalibrationSamples,
    CalibrationSplit,
    Config,
    Exclude,
    Granularity,
    Label,
    Model,
    Objective,
    Overwrite,
    Polish,
    Repair,
    Scope,
    Seed,
    Steps,
    Targets,
    check_texts,
    echo,
    read_config,
    read_task,
    read_workload,
    start,
)
from hf_prune.errors import ConfigError
from hf_prune.evaluation.tasks import ClassificationTask
from hf_prune.evaluation.tasks.classification import POLISH_SAMPLES


def prune(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Folder for the pruned checkpoint.", show_default=False)] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share to remove, 0 to 1. [default: 0.5]")] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Instead: the largest share whose drop in accuracy is, with 95 % confidence, at most so many points, "
            "measured on held-out sentences of the calibration split."
        ),
    ] = None,
    held_out: Annotated[int, typer.Option(min=1, help="With --max-drop: how many sentences that is.")] = 2000,
    split: Annotated[str, typer.Option(help="With --max-drop: a split whose score is only reported.")] = "validation",
    criterion: Annotated[str | None, typer.Option(help="See: hf-prune list. [default: magnitude]")] = None,
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
    target_params: Annotated[
        float | None, typer.Option(help="Instead of --sparsity, for head, neuron, layer: the share of parameters left.")
    ] = None,
    target_flops: Annotated[
        float | None, typer.Option(help="The same for the operations of a forward pass on the workload.")
    ] = None,
    target_speedup: Annotated[
        float | None, typer.Option(help="The same: how many times as fast on the workload, measured on this machine.")
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(help="Batch size x tokens that --target-flops and --target-speedup mean. [default: 1x128]"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of PyTorch, also while times are measured. [default: its own]")
    ] = None,
    round_to: Annotated[
        int | None, typer.Option(min=1, help="Numbers of heads and neurons left are multiples of this. [default: 1]")
    ] = None,
    shrink: Annotated[
        bool | None,
        typer.Option(
            "--shrink/--no-shrink",
            help="Take out what was pruned as a whole, or leave it in, as masks and zeros. "
            "[default: heads, neurons and layers are taken out; rows, columns and channels stay]",
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
    restart: Annotated[bool, typer.Option("--restart", help="With --stream: begin anew instead of resuming.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Prune a checkpoint and save it as one that plain transformers loads."""
    if out is None and not dry_run:
        raise ConfigError("no --out: name the folder for the pruned checkpoint, or pass --dry-run to see the plan")
    for option, given in (("--sparsity", sparsity is not None), ("--dry-run", dry_run)):
        if max_drop is not None and given:
            raise ConfigError(f"--max-drop finds the sparsity by measuring, which contradicts {option}: leave one out")
    for option, given in (("--max-drop", max_drop is not None), ("--plots", plots)):
        if stream and given:
            raise ConfigError(f"--stream never holds the model, which {option} needs: leave one out")
    for option, given in (("--max-drop", max_drop is not None), ("--stream", stream), ("--dry-run", dry_run)):
        if polish_samples is not None and given:
            raise ConfigError(f"--polish-samples has no meaning with {option}: leave one out")
    if restart and not stream:
        raise ConfigError("--restart begins a streaming run anew: add --stream, or leave it out")
    start([model])
    settings = read_config(
        config,
        sparsity=sparsity,
        criterion=criterion,
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
        target_params=target_params,
        target_flops=target_flops,
        target_speedup=target_speedup,
        workload=None if workload is None else read_workload(workload),
        round_to=round_to,
    )
    if shrink is not None and not (settings.removes_units or settings.granularity in ("row", "column", "channel")):
        raise ConfigError(
            f"--shrink and --no-shrink are for head, neuron, layer, row, column and channel, not for granularity "
            f"{settings.granularity!r}: leave them out"
        )
    from hf_prune.planning.plan import sparsity_notes

    for note in sparsity_notes(settings) if max_drop is None and not dry_run else []:
        echo(f"note: {note}", err=True)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if stream:
        from hf_prune.conversion.streaming.prune_stream import check_streamable

        check_streamable(settings)
    of_language = max_drop is None and is_language_model(model_class(model))
    source = data or (WIKITEXT if of_language else SST2)
    learns = settings.learns_allocation or settings.learns_units
    if (learns if dry_run else settings.needs_data) or max_drop is not None:
        from hf_prune.criteria.base import LABELLED

        with_labels = max_drop is not None or (not of_language and bool(settings.needs & LABELLED))
        check_texts([model], source, labelled=with_labels)
    from hf_prune.cli.workflows.prune import plan_checkpoint, prune_checkpoint, prune_to_budget
    from hf_prune.cli.workflows.stream import stream_checkpoint
    from hf_prune.conversion.streaming.prune_stream import plan_stream
    from hf_prune.utils.distributed import is_main_process

    seen = (calibration_split, calibration_samples)
    task = read_task(of_language, source, text_column, label_column, *seen, window=window)
    if out is None or dry_run:
        plan = plan_stream(model, settings) if stream else plan_checkpoint(model, settings, task=task)
        echo(json.dumps(plan.to_dict(), indent=2) if as_json else str(plan))
        return
    if stream:
        with resumable():
            report = stream_checkpoint(model, settings, out, task=task, restart=restart, overwrite=overwrite)
        text, values = str(report), report.to_dict()
    elif max_drop is None:
        report = prune_checkpoint(
            model,
            settings,
            out,
            task=task,
            polish_samples=polish_samples,
            plots=plots,
            shrink=shrink,
            overwrite=overwrite,
        )
        text, values = str(report), report.to_dict()
    else:
        assert isinstance(task, ClassificationTask)
        search, reported, report = prune_to_budget(
            model,
            settings,
            out,
            task,
            max_drop=max_drop,
            held_out=held_out,
            split=split,
            batch_size=batch_size,
            plots=plots,
            overwrite=overwrite,
        )
        text = f"{search}\nOn {split}, which had no say: {reported}\n\n{report}"
        values = {
            "search": search.to_dict(),
            "reported": {"split": split, **reported.to_dict()},
            "report": report.to_dict(),
        }
    if is_main_process():  # of the processes that accelerate launch started
        echo(json.dumps(values, indent=2) if as_json else f"{text}\nSaved in {out}.")
