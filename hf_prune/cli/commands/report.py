"""hf-prune report: options, help, and what it prints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.console import echo
from hf_prune.cli.model_options import MACHINE, SOURCE, UNSEEDED, loads_model
from hf_prune.cli.options import AsJson, Model, Overwrite
from hf_prune.cli.startup import start
from hf_prune.errors import DataError
from hf_prune.utils.output_folder import check_output, warn_replaced


@loads_model(SOURCE, MACHINE, UNSEEDED)
def report(
    model: Model,
    dense: Annotated[str | None, typer.Option(help="The dense checkpoint, for statistics before pruning.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for weights.png and layers.png.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Count what is zero in a checkpoint, tensor by tensor and in total."""
    start([model, *([dense] if dense else [])])
    from hf_prune.evaluation.plots import PLOTS, write_plots
    from hf_prune.utils.figures import is_drawn

    if plots is not None:
        drawn = [path for name in PLOTS if is_drawn(path := plots / name)]
        check_output(plots, "report", [model, dense], overwrite=overwrite, beside=drawn)
    from hf_prune.auto import load_native
    from hf_prune.checkpoint.files import size_of_weights
    from hf_prune.evaluation.sparsity_report import sparsity_report
    from hf_prune.evaluation.weight_statistics import weight_histogram
    from hf_prune.utils.formatting import display_name

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
        warn_replaced(plots, PLOTS)
        write_plots(plots, result, before, after, display_name(model))
    echo(result.to_json() if as_json else str(result))
