"""hf-prune bench and hf-prune explain: is it faster now?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.options import AsJson, Label, Model, Overwrite, Text, echo, split_names, start
from hf_prune.errors import ConfigError
from hf_prune.evaluation.tasks import ClassificationTask
from hf_prune.utils.output_folder import check_file, say_replaced

EXPORTED = (".onnx", ".xml")
DTYPES = ("float32", "bfloat16", "float16")
PICTURES = (".png", ".svg", ".pdf")

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...", help="Checkpoints, Hub ids, .onnx or .xml files; the others are compared with the first."
    ),
]
Batches = Annotated[str, typer.Option(help="Batch sizes, separated by commas.")]
Lengths = Annotated[str, typer.Option(help="Tokens of each example, separated by commas.")]
Dtype = Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}: of all models alike.")]
Device = Annotated[str, typer.Option(help="Where they run, such as cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch. [default: its own]")]
Rounds = Annotated[int, typer.Option(min=1, help="How many times each is timed, in turns.")]
Warmup = Annotated[int, typer.Option(min=1, help="How many times before that.")]


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
        int, typer.Option(min=0, help="Causal language models: also time the generation of so many tokens.")
    ] = 0,
    data: Annotated[
        str | None, typer.Option(help="Labelled data: the picture then shows accuracy against speed.")
    ] = None,
    split: Annotated[str, typer.Option(help="The split to score.")] = "validation",
    text_column: Text = "sentence",
    label_column: Label = "label",
    plot: Annotated[Path | None, typer.Option(help="Picture to write: PNG, SVG or PDF.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Time checkpoints in turns, and say which differences are real."""
    start([name for name in models if not name.endswith(EXPORTED)], data)
    sizes = [_whole("--batch", batch), _whole("--length", length)]
    if data is not None and plot is None and not as_json:
        raise ConfigError("--data scores the models for the picture: add --plot FILE.png, or leave it out")
    if plot is not None and plot.suffix not in PICTURES:
        raise ConfigError(f"--plot is {str(plot)!r}: expected a file that ends in {', '.join(PICTURES)}")
    if plot is not None:
        check_file(plot, overwrite=overwrite)
    from hf_prune.cli.workflows.bench import load_alike, load_tokenizers, score_all, zero_notes
    from hf_prune.evaluation.plots import plot_latency, save_figure
    from hf_prune.inference.latency import measure_latency

    _check_dtype(dtype)
    loaded = load_alike(models, dtype, device, threads)
    tokenizers = {} if data is None else load_tokenizers(loaded, models)  # or an error, before minutes of timing
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
        say_replaced(plot.parent, [plot.name])
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


def explain(
    model: Model,
    against: Annotated[str | None, typer.Option(help="The dense checkpoint: both are then timed, in turns.")] = None,
    batch: Batches = "1",
    length: Lengths = "128",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    rounds: Rounds = 30,
    warmup: Warmup = 3,
) -> None:
    """Say whether a checkpoint is faster than the dense one, where, and why not."""
    start([model, *([against] if against else [])])
    sizes = [_whole("--batch", batch), _whole("--length", length)]
    from hf_prune.cli.workflows.bench import load_alike
    from hf_prune.evaluation.explain import explain_speed
    from hf_prune.inference.latency import measure_latency

    _check_dtype(dtype)
    names = [*([against] if against else []), model]
    loaded = load_alike(names, dtype, device)
    measured = None
    if against:
        measured = measure_latency(
            loaded, batch_sizes=sizes[0], lengths=sizes[1], rounds=rounds, warmup=warmup, threads=threads
        )
    echo(explain_speed(list(loaded.values())[-1], measured))


def _whole(option: str, text: str) -> Sequence[int]:
    parts = split_names(text)
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"{option} is {text!r}: expected whole numbers separated by commas, such as 1,32")
    return [int(part) for part in parts]


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        from hf_prune.utils.registry import unknown_name

        raise unknown_name("dtype", dtype, DTYPES)
