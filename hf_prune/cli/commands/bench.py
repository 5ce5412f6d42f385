"""hf-prune bench: options, help, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.console import echo
from hf_prune.cli.options import AsJson, Label, Overwrite, Text, split_names
from hf_prune.cli.startup import start
from hf_prune.cli.timing_options import (
    Batches,
    Device,
    Dtype,
    Lengths,
    Rounds,
    Threads,
    Warmup,
    check_dtype,
    split_whole_numbers,
)
from hf_prune.errors import ConfigError
from hf_prune.evaluation.tasks import ClassificationTask
from hf_prune.utils.output_folder import check_file, warn_replaced

EXPORTED_SUFFIXES = (".onnx", ".xml")
PLOT_SUFFIXES = (".png", ".svg", ".pdf")

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...", help="Checkpoints, Hub ids, .onnx or .xml files; the others are compared with the first."
    ),
]


def bench(
    models: Models,
    batch: Batches = "1",
    length: Lengths = "128",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    rounds: Rounds = 30,
    warmup: Warmup = 3,
    new_tokens: Annotated[
        int, typer.Option(min=0, help="Causal language models: also time the generation of this many tokens.")
    ] = 0,
    data: Annotated[str | None, typer.Option(help="Labelled data: the plot then shows accuracy against speed.")] = None,
    split: Annotated[str, typer.Option(help="The split to score.")] = "validation",
    text_column: Text = "sentence",
    label_column: Label = "label",
    plot: Annotated[Path | None, typer.Option(help="Plot to write: PNG, SVG or PDF.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Time checkpoints in turns, and say which differences are real."""
    start([name for name in models if not name.endswith(EXPORTED_SUFFIXES)], data)
    sizes = [split_whole_numbers("--batch", batch), split_whole_numbers("--length", length)]
    if data is not None and plot is None and not as_json:
        raise ConfigError("--data scores the models for the plot: add --plot FILE.png, or leave it out")
    if plot is not None and plot.suffix not in PLOT_SUFFIXES:
        raise ConfigError(f"--plot is {str(plot)!r}: expected a file that ends in {', '.join(PLOT_SUFFIXES)}")
    if plot is not None:
        check_file(plot, overwrite=overwrite)
    from hf_prune.cli.workflows.bench import load_alike, load_tokenizers, score_all, zero_notes
    from hf_prune.evaluation.plots import plot_latency, save_figure
    from hf_prune.inference.latency import measure_latency

    check_dtype(dtype)
    loaded = load_alike(models, dtype, device, threads)
    tokenizers = {} if data is None else load_tokenizers(loaded, models)  # raises before minutes of timing
    result = measure_latency(
        loaded,
        batch_sizes=sizes[0],
        lengths=sizes[1],
        rounds=rounds,
        warmup=warmup,
        threads=threads,
        new_tokens=new_tokens,
    )
    accuracies: dict[str, float] = {}
    if data is not None:
        labelled = ClassificationTask(data, split_names(text_column), label_column)
        accuracies = score_all(loaded, tokenizers, labelled, split)
    notes = zero_notes(loaded)
    if plot is not None:
        warn_replaced(plot.parent, [plot.name])
        save_figure(plot_latency(result, accuracies, "hf-prune bench"), plot)
    if as_json:
        from hf_prune.hub.checksums import measured_weights

        weights = {name: measured_weights(source) for name, source in zip(loaded, models, strict=True)}
        values = {**result.to_dict(), "weights": weights, "accuracies": accuracies, "notes": notes}
        echo(json.dumps(values, indent=2))
        return
    echo("\n".join([str(result), *notes]))
    for name, accuracy in accuracies.items():
        echo(f"{name}: {100 * accuracy:.2f} % right on {split} of {data}")
    if plot is not None:
        echo(f"Drawn: {plot}")
