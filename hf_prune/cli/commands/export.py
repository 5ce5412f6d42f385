"""hf-prune export: options, help, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.console import echo
from hf_prune.cli.options import Model, Overwrite
from hf_prune.cli.startup import start
from hf_prune.utils.output_folder import check_file


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="FILE", help="FILE.onnx, or FILE.xml for OpenVINO.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint, masked or shrunk, as ONNX or for OpenVINO, and compare its outputs with PyTorch's."""
    start([model])
    check_file(out, overwrite=overwrite)
    from hf_prune.auto import load_native
    from hf_prune.conversion.export import export_model

    echo(str(export_model(load_native(model).float(), out, overwrite=overwrite)))
