"""hf-prune bench: options, help, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.cli.console import echo
from hf_prune.cli.model_options import Device, loads_model
from hf_prune.cli.options import CLASSES, LANGUAGE, AnyText, AsJson, Label, Overwrite, read_task, task_kind
from hf_prune.cli.startup import check_texts, start
from hf_prune.cli.timing_options import (
    Accelerate,
    Batches,
    Dtype,
    Lengths,
    Rounds,
    Threads,
    Warmup,
    check_dtype,
    given_workload,
    split_whole_numbers,
)
from hf_prune.errors import ConfigError
from hf_prune.utils.output_folder import check_file, warn_replaced

EXPORTED_SUFFIXES = (".onnx", ".xml", ".pte")
PLOT_SUFFIXES = (".png", ".svg", ".pdf")

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="Checkpoints, Hub ids, .onnx, .xml or .pte files; the others are compared with the first.",
    ),
]


@loads_model()
def bench(
    models: Models,
    batch: Batches = "1",
    length: Lengths = "128",
    dtype: Dtype = "float32",
    device: Device = "auto",
    threads: Threads = None,
    rounds: Rounds = 30,
    warmup: Warmup = 3,
    new_tokens: Annotated[
        int, typer.Option(min=0, help="Causal language models: also time the generation of this many tokens.")
    ] = 0,
    accelerate: Accelerate = False,
    data: Annotated[
        str | None,
        typer.Option(help="Data to score on: the plot then shows accuracy, or perplexity, against speed."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="The split to score. [default: validation, or test for language models]")
    ] = None,
    text_column: AnyText = None,
    label_column: Label = None,
    plot: Annotated[Path | None, typer.Option(help="Plot to write: PNG, SVG or PDF.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Time checkpoints in turns, and say which differences are real."""
    checkpoints = [name for name in models if not name.endswith(EXPORTED_SUFFIXES)]
    scores_language = data is not None and task_kind(models[0]) == LANGUAGE
    if scores_language:
        check_texts(checkpoints, data, labelled=False)
    start(checkpoints, None if scores_language else data, quantized=True)
    sizes = [split_whole_numbers("--batch", batch), split_whole_numbers("--length", length)]
    if data is not None and plot is None and not as_json:
        raise ConfigError("--data scores the models for the plot: add --plot FILE.png, or leave it out")
    if plot is not None and plot.suffix not in PLOT_SUFFIXES:
        raise ConfigError(f"--plot is {str(plot)!r}: expected a file that ends in {', '.join(PLOT_SUFFIXES)}")
    if plot is not None:
        check_file(plot, overwrite=overwrite)
    from hf_prune.cli.workflows.bench import (
        load_alike,
        load_tokenizers,
        measure_accelerations,
        of_language_models,
        score_all,
        zero_notes,
    )
    from hf_prune.evaluation.plots import plot_latency
    from hf_prune.inference.latency import measure_latency
    from hf_prune.utils.figures import save_figure
    from hf_prune.utils.formatting import format_workload

    check_dtype(dtype)
    loaded = load_alike(models, dtype, device, threads)
    tokenizers = {} if data is None else load_tokenizers(loaded, models)  # raises before minutes of timing
    workload = given_workload(sizes[0][0], sizes[1][0], threads)
    accelerations = measure_accelerations(loaded, workload) if accelerate else {}  # first, since it may refuse a model
    result = measure_latency(
        loaded,
        batch_sizes=sizes[0],
        lengths=sizes[1],
        rounds=rounds,
        warmup=warmup,
        threads=threads,
        new_tokens=new_tokens,
    )
    scores: dict[str, float] = {}
    kind, by = (LANGUAGE, "perplexity") if of_language_models(loaded) else (CLASSES, "accuracy (%)")
    task: Any = read_task(kind, data, text_column, label_column)
    if task is not None:
        scores = score_all(loaded, tokenizers, task, split)
    notes = zero_notes(loaded, accelerate)
    if plot is not None:
        warn_replaced(plot.parent, [plot.name])
        save_figure(plot_latency(result, scores, "hf-prune bench", measure=by), plot)
    if as_json:
        from hf_prune.hub.checksums import measured_weights

        weights = {name: measured_weights(source) for name, source in zip(loaded, models, strict=True)}
        values = {
            **result.to_dict(),
            "weights": weights,
            ("perplexities" if kind == LANGUAGE else "accuracies"): scores,
            "accelerations": {name: report.to_dict() for name, report in accelerations.items()},
            "notes": notes,
        }
        echo(json.dumps(values, indent=2))
        return
    brought = [
        f"{name}, {format_workload(report.batch_size, report.length)}: {report.sentence}"
        for name, report in accelerations.items()
    ]
    echo("\n".join([str(result), *brought, *notes]))
    for name, score in scores.items():
        said = f"perplexity {score:.2f}" if kind == LANGUAGE else f"{100 * score:.2f} % right"
        echo(f"{name}: {said} on {split or task.default_split} of {data}")
    if plot is not None:
        echo(f"Drawn: {plot}")
