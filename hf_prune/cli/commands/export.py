"""hf-prune export: options, help, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.console import show
from hf_prune.cli.model_options import RUN, SOURCE, loads_model
from hf_prune.cli.options import AsJson, Model, Overwrite
from hf_prune.cli.panels import one_of
from hf_prune.cli.startup import start
from hf_prune.errors import DataError, ExportError
from hf_prune.utils.output_folder import check_file

_TYPES = ("f32", "f16", "bf16", "q8_0")


@loads_model(SOURCE, RUN)
def export(
    model: Model,
    out: Annotated[
        Path, typer.Argument(metavar="FILE", help="FILE.onnx, or for OpenVINO .xml, ExecuTorch .pte, llama.cpp .gguf.")
    ],
    gguf_type: Annotated[
        str | None,
        one_of(_TYPES, "How a GGUF file stores matrices; q8_0 is int8. [default: f16]", show_default=False),
    ] = None,
    quantize: Annotated[
        str | None,
        one_of(("int8",), "Write an ONNX or OpenVINO file with int8 weights. [default: float32]", show_default=False),
    ] = None,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache", help="ONNX and OpenVINO: with a key-value cache, for generation, as inputs and outputs."
        ),
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint, masked or shrunk, for ONNX Runtime, OpenVINO, ExecuTorch or llama.cpp, and check the file."""
    start([model])
    check_file(out, overwrite=overwrite)
    from hf_prune.auto import load_native

    if out.suffix == ".gguf":
        if quantize is not None:
            raise ExportError(f"--quantize is for FILE.onnx and FILE.xml: for {out}, choose --gguf-type q8_0")
        if cache:
            raise ExportError("--cache is for FILE.onnx and FILE.xml: llama.cpp has one with any file, so leave it out")
        from hf_prune.checkpoint.companions import has_tokenizer
        from hf_prune.checkpoint.native import load_tokenizer
        from hf_prune.checkpoint.sources import check_model_source
        from hf_prune.conversion.gguf.write import export_gguf

        offline = check_model_source(model)
        if not has_tokenizer(model, local_files_only=offline):
            raise DataError(f"{model!r} has no tokenizer, which a GGUF file holds: save one beside the model")
        tokenizer = load_tokenizer(model, local_files_only=offline)
        show(export_gguf(load_native(model), tokenizer, out, dtype=gguf_type or "f16", overwrite=overwrite), as_json)
        return
    if gguf_type is not None:
        raise ExportError(f"--gguf-type is for FILE.gguf, and {out} ends in {out.suffix!r}")
    from hf_prune.conversion.export import export_model

    show(export_model(load_native(model).float(), out, quantize=quantize, cache=cache, overwrite=overwrite), as_json)
