"""hf-prune explain: options, help, and what it prints."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_prune.cli.console import echo
from hf_prune.cli.options import Model
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
    sizes = [split_whole_numbers("--batch", batch), split_whole_numbers("--length", length)]
    from hf_prune.cli.workflows.bench import load_alike
    from hf_prune.evaluation.explain import explain_speed
    from hf_prune.inference.latency import measure_latency

    check_dtype(dtype)
    names = [*([against] if against else []), model]
    loaded = load_alike(names, dtype, device)
    measured = None
    if against:
        measured = measure_latency(
            loaded, batch_sizes=sizes[0], lengths=sizes[1], rounds=rounds, warmup=warmup, threads=threads
        )
    echo(explain_speed(list(loaded.values())[-1], measured))
