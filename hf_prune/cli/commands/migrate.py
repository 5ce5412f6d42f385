"""hf-prune migrate: options, help, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.cli.console import show
from hf_prune.cli.model_options import CODE, UNSEEDED, loads_model
from hf_prune.cli.options import AsJson, OutFolder, Overwrite
from hf_prune.cli.startup import start
from hf_prune.errors import ConfigError


@loads_model(CODE, UNSEEDED)
def migrate(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that another tool wrote.", show_default=False)
    ],
    out: OutFolder,
    adopt_zeros: Annotated[
        bool,
        typer.Option("--adopt-zeros", help="It has no masks but zeros in plain weights: make masks from these."),
    ] = False,
    min_sparsity: Annotated[
        float | None,
        typer.Option(
            help="With --adopt-zeros: weights with a smaller share of zeros get no mask. [default: 0.01]",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint pruned by torch.nn.utils.prune, parametrize, compressed-tensors or transformers 4."""
    if min_sparsity is not None and not adopt_zeros:
        raise ConfigError("--min-sparsity says which zeros to adopt: add --adopt-zeros, or leave it out")
    if adopt_zeros:
        from hf_prune.cli.workflows.adopt import adopt_checkpoint

        start([str(folder)])
        settings = {} if min_sparsity is None else {"min_sparsity": min_sparsity}
        report: Any = adopt_checkpoint(folder, out, overwrite=overwrite, **settings)
    else:
        from hf_prune.conversion.migration import migrate_checkpoint

        report = migrate_checkpoint(folder, out, overwrite=overwrite)
    show(report, as_json, f"Saved: {out}")
