"""hf-prune accelerate: options, help, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.console import echo
from hf_prune.cli.model_options import DTYPE, RUN, SOURCE, loads_model
from hf_prune.cli.options import AsJson, Model, Overwrite, split_names
from hf_prune.cli.startup import start
from hf_prune.cli.timing_options import Batch, Length, Threads, given_workload
from hf_prune.utils.output_folder import check_file


@loads_model(SOURCE, DTYPE, RUN)  # kernels are for the CPU
def accelerate(
    model: Model,
    batch: Batch = None,
    length: Length = None,
    threads: Threads = None,
    dtypes: Annotated[str, typer.Option(help="More precisions for layers: bfloat16,float16,int8.")] = "",
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="The largest change of an output, as a share of the largest output. [default: 1e-4, or twice the "
            "rounding of the model's precision]",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the choice of kernels to this JSON file.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure which kernels make a checkpoint faster on this machine, layer by layer, and by how much."""
    start([model])
    if out is not None:
        check_file(out, overwrite=overwrite)
    import torch

    from hf_prune.auto import load_native
    from hf_prune.hub.card_speed import allowed_text
    from hf_prune.hub.checksums import measured_weights
    from hf_prune.inference.acceleration.accelerate import accelerate as choose_kernels
    from hf_prune.utils.files import write_json

    if threads is not None:
        torch.set_num_threads(threads)
    report = choose_kernels(
        load_native(model),
        workload=given_workload(batch, length, None),
        dtypes=split_names(dtypes) if dtypes else (),
        tolerance=tolerance,
        progress=True,
    )
    if not as_json:
        echo(str(report))
        if out is None:
            return
    values = {**report.to_dict(), "weights": measured_weights(model)}  # for hf-prune card
    if as_json:
        echo(json.dumps(values, indent=2))
    if out is not None:
        write_json(out, values)
        if not as_json:
            first = f"torch.set_num_threads({threads}); " if threads is not None else ""
            call = f"{first}model.accelerate(saved={str(out)!r}{allowed_text(report)})"
            echo(f"Saved: {out}; in Python: {call}")
