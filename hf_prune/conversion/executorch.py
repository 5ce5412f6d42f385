"""Write ExecuTorch programs, by the exporter of transformers, for XNNPACK on the CPUs of phones and computers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import __version__ as transformers_version

from hf_prune.conversion.exported_graphs import quiet, reason_of
from hf_prune.errors import ExportError
from hf_prune.inference.backends import names_file
from hf_prune.utils.files import write_text

MOST_EXAMPLES = 8  # of a batch, for which memory is planned
MOST_TOKENS = 512  # of an example, or what the model can read if that is less


def executorch_program(model: Any, inputs: Mapping[str, Tensor]) -> Callable[[Path], None]:
    """Trace a model, and return a function that writes the ``.pte`` file, and beside it the names of its inputs.

    The program knows its inputs by their order. The first two dimensions of texts are free, and the first one of other
    inputs, up to the sizes that memory is planned for: :data:`MOST_EXAMPLES` and :data:`MOST_TOKENS`.

    Args:
        model: The model, in eval mode.
        inputs: Keyword arguments of a forward pass, to trace it with.

    Raises:
        ExportError: If transformers is too old, or the model cannot be exported.
    """
    try:
        with quiet():  # what ExecuTorch imports warns of itself
            from transformers.exporters.exporter_executorch import ExecutorchConfig, ExecutorchExporter
    except ImportError as error:
        raise ExportError(
            f"transformers {transformers_version} has no exporter for ExecuTorch, or one for another version of it "
            f"({reason_of(error)}): pip install --upgrade transformers 'hf_prune[executorch]'"
        ) from error

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = min(MOST_TOKENS, positions) if isinstance(positions, int) and positions > 1 else MOST_TOKENS
    free = {0: torch.export.Dim("examples", min=1, max=MOST_EXAMPLES)}
    of_texts = {**free, 1: torch.export.Dim("tokens", min=1, max=tokens)}
    shapes = {name: of_texts if value.dim() == 2 else free for name, value in inputs.items()}
    largest = {
        name: [MOST_EXAMPLES, tokens] if value.dim() == 2 else [MOST_EXAMPLES, *value.shape[1:]]
        for name, value in inputs.items()
    }
    try:
        with quiet():
            config = ExecutorchConfig(backend="xnnpack", dynamic=True, dynamic_shapes=shapes)
            program, _ = ExecutorchExporter().export_program(model, dict(inputs), config)
    except Exception as error:  # torch and ExecuTorch raise many kinds
        raise ExportError(
            f"ExecuTorch cannot take this {type(model).__name__}: {reason_of(error)}; export it to .onnx"
        ) from error

    def save(path: Path) -> None:
        ExecutorchExporter.save_program(program, path)
        write_text(names_file(path), json.dumps({"inputs": largest}, indent=2) + "\n")

    return save
