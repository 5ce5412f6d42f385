"""hf-prune compress: options, help, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.console import show
from hf_prune.cli.options import AsJson, OutFolder, Overwrite
from hf_prune.cli.panels import one_of


def compress(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder with a dense checkpoint.", show_default=False)
    ],
    out: OutFolder,
    codec: Annotated[str, one_of(("zstd", "none"), "How values are packed; none stores them as they are.")] = "zstd",
    values: Annotated[
        str, one_of(("exact", "int8"), "int8 rounds the remaining weights: measure what that costs.")
    ] = "exact",
    remote_code: Annotated[
        bool,
        typer.Option(
            "--remote-code",
            help="Add a file for trust_remote_code=True, to load it where hf_prune is not installed.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a pruned checkpoint in packed form; with hf_prune imported, plain transformers loads it."""
    from hf_prune.conversion.compression import compress_checkpoint

    report = compress_checkpoint(folder, out, codec=codec, values=values, remote_code=remote_code, overwrite=overwrite)
    show(report, as_json, f"Saved: {out}")
