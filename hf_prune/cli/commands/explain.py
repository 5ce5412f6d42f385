"""hf-prune explain: options, help, and what it prints."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_prune.cli.console import show
from hf_prune.cli.model_options import Device, loads_model
from hf_prune.cli.options import AsJson, Model
from hf_prune.cli.startup import start
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


@loads_model()
def explain(
    model: Model,
    against: Annotated[str | None, typer.Option(help="The dense checkpoint: both are then timed, in turns.")] = None,
    batch: Batches = "1",
    length: Lengths = "128",
    dtype: Dtype = "float32",
    device: Device = "auto",
    threads: Threads = None,
    rounds: Rounds = 30,
    warmup: Warmup = 3,
    accelerate: Accelerate = False,
    as_json: AsJson = False,
) -> None:
    """Say whether a checkpoint is faster than the dense one, where, and why not."""
    start([model, *([against] if against else [])], quantized=True)
    sizes = [split_whole_numbers("--batch", batch), split_whole_numbers("--length", length)]
    from hf_prune.cli.workflows.bench import load_alike
    from hf_prune.evaluation.explain import explain_speed, speed_reasons
    from hf_prune.inference.acceleration.accelerate import measure_acceleration
    from hf_prune.inference.latency import measure_latency

    check_dtype(dtype)
    names = [*([against] if against else []), model]
    loaded = load_alike(names, dtype, device)
    measured = None
    if against:
        measured = measure_latency(
            loaded, batch_sizes=sizes[0], lengths=sizes[1], rounds=rounds, warmup=warmup, threads=threads
        )
    explained = list(loaded.values())[-1]
    acceleration = None
    if accelerate:
        workload = given_workload(sizes[0][0], sizes[1][0], threads)
        acceleration = measure_acceleration(explained, workload, progress=True)
    if as_json:
        found = {"measured": measured and measured.to_dict(), "acceleration": acceleration and acceleration.to_dict()}
        show({"reasons": speed_reasons(explained), **found}, as_json)
    else:
        show(explain_speed(explained, measured, acceleration), as_json)
