"""hf-prune decompress: options, help, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.console import show
from hf_prune.cli.options import AsJson, OutFolder, Overwrite


def decompress(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder with a compressed checkpoint.", show_default=False)
    ],
    out: OutFolder,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a compressed checkpoint in dense form, which plain transformers loads without hf_prune."""
    from hf_prune.conversion.decompression import decompress_checkpoint

    show(decompress_checkpoint(folder, out, overwrite=overwrite), as_json, f"Saved: {out}")
