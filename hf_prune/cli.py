"""hf-prune: the command line. It reads settings, calls the library, and prints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_prune import __version__
from hf_prune.calibration_data import POLISH_SAMPLES, LabelledData, TextData
from hf_prune.cli_card import card, verify
from hf_prune.cli_compress import compress, decompress, migrate
from hf_prune.cli_hub import push
from hf_prune.cli_options import (
    SST2,
    WIKITEXT,
    Allocation,
    AnyData,
    AnyText,
    AsJson,
    BatchSize,
    CalibrationSamples,
    CalibrationSplit,
    Command,
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
    check_texts,
    echo,
    read_config,
    read_workload,
    show_notices,
    split_names,
    split_numbers,
    start,
)
from hf_prune.cli_space import space
from hf_prune.cli_speed import bench, explain
from hf_prune.cli_train import lottery, train
from hf_prune.cli_trim import trim_vocab
from hf_prune.config import UNIT_CRITERIA_OF, UNIT_SCOPES, UNITS, PruningConfig
from hf_prune.errors import ConfigError, DataError, HfPruneError
from hf_prune.outputs import check_file, check_output, say_replaced
from hf_prune.registry import CRITERIA, GRANULARITIES
from hf_prune.sources import is_language_model, model_class
from hf_prune.tables import format_table, in_one_line

if TYPE_CHECKING:
    from hf_prune.criteria.base import Criterion

app = typer.Typer(
    name="hf-prune",
    help="Prune Hugging Face models, see what it costs and what it brings, and save the result.",
    epilog="Start with: hf-prune demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
command = functools.partial(app.command, cls=Command)


def _version(asked: bool) -> None:
    if asked:
        echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Prune Hugging Face models, see what it costs and what it brings, and save the result."""
    show_notices()


@command(epilog="Example: hf-prune demo --out my-first-pruning")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results, plots and the pruned checkpoint.")] = Path(
        "hf-prune-demo"
    ),
    restart: Restart = False,
    overwrite: Overwrite = False,
) -> None:
    """Prune a small sentiment classifier from start to end; needs no Hub and no data of yours."""
    from hf_prune.demo import prepare_demo
    from hf_prune.workflows import prune_checkpoint, sweep_checkpoint

    begin = time.perf_counter()
    start([])
    assets = prepare_demo(echo=echo)
    program = "hf-prune" if shutil.which("hf-prune") else sys.argv[0]
    arguments = [program, "sweep", str(assets.model_dir), "--data", str(assets.data_dir), "--out", str(out)]
    echo(f"\nScoring it at several sparsities. The same by hand:\n  {' '.join(arguments)}\n")
    _say_if_continuing(out, restart)
    model, data = str(assets.model_dir), LabelledData(str(assets.data_dir))
    with _resumable():
        result = sweep_checkpoint(
            model, data, out, restart=restart, name="demo model", data_name="Rotten Tomatoes", overwrite=overwrite
        )
    echo(f"{result}\n{_sweep_files(out)}")
    best = result.sweet_spot
    sparsity = best.sparsity if best is not None else min(p.sparsity for p in result.points)
    chosen = "the sweet spot" if best is not None else "the smallest of them, since there is no sweet spot"
    pruned = out / "pruned"
    echo(f"\nPruning at {100 * sparsity:g} %, {chosen}. The same by hand:")
    echo(f"  {program} prune {assets.model_dir} --sparsity {sparsity:g} --out {pruned} --plots\n")
    report = prune_checkpoint(
        model, PruningConfig(sparsity=sparsity), pruned, plots=True, name="demo model", overwrite=overwrite
    )
    echo(report.summary())
    echo(
        f"\nSaved, with its report and two plots, in {pruned}. Plain transformers loads it:\n"
        f"  AutoModelForSequenceClassification.from_pretrained({str(pruned)!r})\n"
        f"Done in {time.perf_counter() - begin:.0f} s."
    )


@command(
    epilog="Examples: hf-prune prune MODEL --sparsity 0.5 --out pruned  |  hf-prune prune MODEL --granularity 2:4 "
    "--criterion taylor --data glue/sst2 --out pruned  |  hf-prune prune MODEL --sparsity 0.5 --dry-run  |  "
    "hf-prune prune MODEL --max-drop 1.0 --criterion alps --data glue/sst2 --out pruned  |  "
    "hf-prune prune MODEL --stream --criterion wanda --scope row --data my-texts --text-column text --out pruned"
)
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
    from hf_prune.plan import sparsity_notes

    for note in sparsity_notes(settings) if max_drop is None and not dry_run else []:
        echo(f"note: {note}", err=True)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if stream:
        from hf_prune.stream import check_streamable

        check_streamable(settings)
    of_language = max_drop is None and is_language_model(model_class(model))
    source = data or (WIKITEXT if of_language else SST2)
    learns = settings.learns_allocation or settings.learns_units
    if (learns if dry_run else settings.needs_data) or max_drop is not None:
        from hf_prune.criteria.base import LABELLED

        with_labels = max_drop is not None or (not of_language and bool(settings.needs & LABELLED))
        check_texts([model], source, labelled=with_labels)
    from hf_prune.distributed import is_first
    from hf_prune.stream import plan_stream
    from hf_prune.workflows import plan_checkpoint, prune_checkpoint, prune_to_budget, stream_checkpoint

    columns = split_names(text_column or "sentence")
    labelled = LabelledData(source, columns, label_column, calibration_split, calibration_samples)
    texts = TextData(source, text_column or "text", calibration_split, calibration_samples, window)
    if out is None or dry_run:
        chosen = texts if of_language else labelled
        plan = plan_stream(model, settings) if stream else plan_checkpoint(model, settings, data=chosen)
        echo(json.dumps(plan.to_dict(), indent=2) if as_json else str(plan))
        return
    if stream:
        with _resumable():
            chosen = texts if of_language else labelled
            report = stream_checkpoint(model, settings, out, data=chosen, restart=restart, overwrite=overwrite)
        text, values = str(report), report.to_dict()
    elif max_drop is None:
        report = prune_checkpoint(
            model,
            settings,
            out,
            data=texts if of_language else labelled,
            polish_samples=polish_samples,
            plots=plots,
            shrink=shrink,
            overwrite=overwrite,
        )
        text, values = str(report), report.to_dict()
    else:
        search, reported, report = prune_to_budget(
            model,
            settings,
            out,
            labelled,
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
    if is_first():  # of the processes that accelerate launch started
        echo(json.dumps(values, indent=2) if as_json else f"{text}\nSaved in {out}.")


@command(
    epilog="Examples: hf-prune evaluate pruned --data glue/sst2 --against MODEL  |  "
    "hf-prune evaluate LANGUAGE_MODEL --data wiki.test.raw --window 512"
)
def evaluate(
    model: Model,
    data: AnyData = None,
    split: Annotated[
        str | None, typer.Option(help="The split to score. [default: validation, or test for language models]")
    ] = None,
    against: Annotated[str | None, typer.Option(help="A dense checkpoint to compare with, paired.")] = None,
    text_column: AnyText = None,
    label_column: Label = "label",
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Language models: tokens seen at once. [default: what the model has positions for, at most 2048]",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Language models: score only so many windows.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Sentences or windows scored at once. [default: 32, or 1 for language models]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a sequence classifier by accuracy or a causal language model by perplexity, alone or against another."""
    checkpoints = [model, *([against] if against else [])]
    classes = [model_class(name) for name in checkpoints]
    of_language = is_language_model(classes[0])
    if is_language_model(classes[-1]) != of_language:
        raise DataError(f"{model!r} is a {classes[0]}, {against!r} a {classes[1]}: expected two of a kind")
    if not of_language and (window or limit):
        raise ConfigError(
            f"--window and --limit are for language models, and {model!r} is a {classes[0]}: leave them out"
        )
    source = data or (WIKITEXT if of_language else SST2)
    check_texts(checkpoints, source, labelled=not of_language)
    start([])
    from hf_prune.comparison import compare, doubt_of
    from hf_prune.perplexity import compare_perplexity
    from hf_prune.workflows import evaluate_checkpoint, evaluate_language_model

    scores: list[Any]
    comparison: Any = None
    if of_language:
        texts = TextData(source, text_column or "text")
        options: dict[str, Any] = {"window": window, "limit": limit, "batch_size": batch_size or 1}
        scores = [evaluate_language_model(name, texts, split or "test", **options) for name in checkpoints]
        comparison = compare_perplexity(scores[1], scores[0]) if against else None
    else:
        labelled, split = (
            LabelledData(source, split_names(text_column or "sentence"), label_column),
            split or "validation",
        )
        scores = [evaluate_checkpoint(name, labelled, split, batch_size=batch_size or 32) for name in checkpoints]
        comparison = compare(scores[1], scores[0]) if against else None
        if doubt := doubt_of(scores[-1]):
            echo(f"warning: {doubt if against else doubt.replace('the dense model', model, 1)}", err=True)
    if as_json:
        from hf_prune.card_data import measured_weights

        weights = measured_weights(model)
        values: dict[str, Any] = {"model": model, "weights": weights, "evaluation": scores[0].to_dict()}
        if comparison is not None:
            values |= {
                "against": against,
                "against_weights": measured_weights(str(against)),
                "dense": scores[1].to_dict(),
                "comparison": comparison.to_dict(),
            }
        echo(json.dumps(values, indent=2))
        return
    for name, score in zip(checkpoints, scores, strict=True):
        echo(f"{name}: {score}")
    if comparison is not None:
        echo(str(comparison))


@command(
    epilog="Example: hf-prune sweep distilbert/distilbert-base-uncased-finetuned-sst-2-english "
    "--sparsity 0,0.3,0.5,0.6,0.8 --criterion magnitude --data glue/sst2"
)
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
    from hf_prune.workflows import sweep_checkpoint

    _say_if_continuing(out, restart)
    with _resumable():
        result = sweep_checkpoint(
            model,
            LabelledData(data, split_names(text_column), label_column, calibration_split, calibration_samples),
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
    echo(json.dumps(result.to_dict(), indent=2) if as_json else f"{result}\n{_sweep_files(out)}")


@command(epilog="Example: hf-prune report pruned --dense MODEL --plots plots")
def report(
    model: Model,
    dense: Annotated[str | None, typer.Option(help="The dense checkpoint, for statistics before pruning.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for weights.png and layers.png.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Count what is zero in a checkpoint, tensor by tensor and in total."""
    start([model, *([dense] if dense else [])])
    from hf_prune.plots import PLOTS, is_drawn, write_plots

    if plots is not None:
        drawn = [path for name in PLOTS if is_drawn(path := plots / name)]
        check_output(plots, "report", [model, dense], overwrite=overwrite, beside=drawn)
    from hf_prune.auto import load_native
    from hf_prune.checkpoint import size_of_weights
    from hf_prune.report import sparsity_report, weight_histogram
    from hf_prune.workflows import label

    pruned = load_native(model)
    result = dataclasses.replace(sparsity_report(pruned), file_bytes=size_of_weights(model))
    names = [t.name for t in result.targets]
    before = None
    if dense is not None:
        original = load_native(dense)
        if missing := set(names) - {name for name, _ in original.named_parameters()}:
            raise DataError(
                f"{dense!r} is a {type(original).__name__} without {min(missing)}: expected the dense checkpoint that "
                f"{model!r} was pruned from"
            )
        result = result.with_before(sparsity_report(original))
        before = weight_histogram(original, names)
    if plots is not None:
        after = weight_histogram(pruned, names, limit=None if before is None else float(before.edges[-1]))
        say_replaced(plots, PLOTS)
        write_plots(plots, result, before, after, label(model))
    echo(result.to_json() if as_json else str(result))


command(epilog="Example: hf-prune bench MODEL pruned --batch 1,32 --length 64 --threads 1")(bench)
command(epilog="Example: hf-prune explain pruned --against MODEL")(explain)
command(epilog="Example: hf-prune trim-vocab MODEL --texts glue/sst2 --out smaller")(trim_vocab)
command(epilog="Example: hf-prune train MODEL --sparsity 0.8 --teacher self --data glue/sst2 --out pruned")(train)
command(epilog="Example: hf-prune lottery MODEL --sparsity 0.8 --rounds 5 --data glue/sst2 --out ticket")(lottery)
command(epilog="Example: hf-prune card pruned --evaluation scores.json --base-model ID --write")(card)
command(epilog="Example: hf-prune verify MODEL --evaluate --data glue/sst2")(verify)
command(epilog="Example: hf-prune push pruned me/bert-sst2-80 --dry-run")(push)
command(epilog="Example: hf-prune compress pruned small")(compress)
command(epilog="Example: hf-prune decompress small pruned")(decompress)
command(epilog="Examples: hf-prune migrate old new  |  hf-prune migrate sparse out --adopt-zeros")(migrate)
command(epilog="Example: hf-prune space --open")(space)


@command(epilog="Example: hf-prune export pruned pruned.onnx")
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="FILE", help="FILE.onnx, or FILE.xml for OpenVINO.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint, masked or shrunk, as ONNX or for OpenVINO, and compare its outputs with PyTorch's."""
    start([model])
    check_file(out, overwrite=overwrite)
    from hf_prune.auto import load_native
    from hf_prune.export import export_model

    echo(str(export_model(load_native(model).float(), out, overwrite=overwrite)))


@command(name="list", epilog="Example: hf-prune list --json")
def list_(as_json: AsJson = False) -> None:
    """List criteria and granularities, with a description and the paper."""
    criteria = [CRITERIA.get(name) for name in CRITERIA.names()]
    granularities = [GRANULARITIES.get(name) for name in GRANULARITIES.names()]
    if as_json:
        values = {
            "criteria": [
                {
                    "name": c.name,
                    "description": c.description,
                    "paper": c.paper,
                    "needs": sorted(c.needs),
                    "scopes": sorted(c.scopes),
                }
                for c in criteria
            ],
            "granularities": [
                {
                    "name": g.name,
                    "usage": g.usage,
                    "description": g.description,
                    "paper": g.paper,
                    "scopes": sorted(g.scopes),
                }
                for g in granularities
            ],
            "units": [{"name": name, "description": text} for name, text in UNITS.items()],
            "unit_criteria": [
                {"name": name, "needs": needs, "description": text, "paper": paper}
                for name, (needs, text, paper) in UNIT_CRITERIA_OF.items()
            ],
        }
        echo(json.dumps(values, indent=2))
        return
    rows = [[c.name, _needs(c), c.description, c.paper] for c in criteria]
    echo(format_table(["criterion", "needs", "what it keeps", "paper"], rows, left=4) + "\n")
    rows = [[g.usage, ", ".join(sorted(g.scopes)), g.description, g.paper] for g in granularities]
    echo(format_table(["granularity", "scopes", "what goes together", "paper"], rows, left=4) + "\n")
    rows = [[name, ", ".join(UNIT_SCOPES), text] for name, text in UNITS.items()]
    echo(format_table(["taken out whole", "scopes", "what it is"], rows, left=3) + "\n")
    rows = [[name, needs, text, paper] for name, (needs, text, paper) in UNIT_CRITERIA_OF.items()]
    echo(format_table(["their criterion", "needs", "what it keeps", "paper"], rows, left=4))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors that a user can mend are one line on stderr and exit code 1."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: echo(f"warning: {in_one_line(str(message))}", err=True)
        try:
            app(arguments)
        except (HfPruneError, OSError) as error:
            echo(f"error: {in_one_line(str(error))}", err=True)
            sys.exit(1)


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    """What is measured is on disk: say so when the user interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        echo("\nInterrupted. The same command continues where it was.", err=True)
        raise typer.Exit(130) from None


def _needs(criterion: type[Criterion]) -> str:
    from hf_prune.criteria.base import LABELLED

    if criterion.needs & LABELLED:
        return "labelled data"
    return "texts" if criterion.needs else "no data"


def _say_if_continuing(out: Path, restart: bool) -> None:
    if (out / "results.json").exists() and not restart:
        echo(f"Continuing with what {out} has; --restart measures everything anew.", err=True)


def _sweep_files(out: Path) -> str:
    return "Saved: " + ", ".join(str(out / name) for name in ("results.json", "results.csv", "tradeoff.png"))
