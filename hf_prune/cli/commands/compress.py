"""hf-prune compress: options, help, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.console import echo
from hf_prune.cli.options import OutFolder, Overwrite


def compress(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder with a dense checkpoint.", show_default=False)
    ],
    out: OutFolder,
    codec: Annotated[str, typer.Option(help="zstd, or none for values that are stored as they are.")] = "zstd",
    values: Annotated[
        str, typer.Option(help="exact, or int8, which rounds the remaining weights: measure what that costs.")
    ] = "exact",
    remote_code: Annotated[
        bool,
        typer.Option(
            "--remote-code",
            help="Add a file for trust_remote_code=True, to load it where hf_prune is not installed.",
        ),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a pruned checkpoint in packed form; with hf_prune imported, plain transformers loads it."""
    from hf_prune.conversion.compression import compress_checkpoint

    report = compress_checkpoint(folder, out, codec=codec, values=values, remote_code=remote_code, overwrite=overwrite)
    echo(f"{report}\nSaved: {out}")
