"""Write ExecuTorch programs, by the exporter of transformers, for XNNPACK on the CPUs of phones and computers."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import __version__ as transformers_version

from hf_prune.calibration.texts import context_length
from hf_prune.conversion.exported_graphs import first_output, quiet, reason_of
from hf_prune.errors import ExportError
from hf_prune.inference.backends import names_file
from hf_prune.utils.files import write_text
from hf_prune.utils.forward import generates

# What memory is planned for. Where a model continues a text, whose logits are large, that is one example.
MOST_EXAMPLES = 8  # of a batch
MOST_TOKENS = 512  # of an example, or what the model can read if that is less


def most_examples(model: nn.Module) -> int:
    """How many examples a program of a model may read at once."""
    return 1 if generates(model) else MOST_EXAMPLES


def executorch_program(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[Path], None]:
    """Trace a model, and return a function that writes the ``.pte`` file, and beside it the names of its inputs.

    The program returns the logits, or else the first output, and knows its inputs by their order. The first two
    dimensions of texts are free, and the first one of other inputs, up to the sizes that memory is planned for.

    Args:
        model: The model, in eval mode, which is not changed.
        inputs: Keyword arguments of a forward pass, to trace it with, of at most :func:`most_examples`.

    Raises:
        ExportError: If transformers is too old, or the model cannot be exported.
    """
    try:
        with quiet():  # what ExecuTorch imports warns of itself
            from transformers.exporters.exporter_executorch import ExecutorchConfig, ExecutorchExporter

            export = ExecutorchExporter().export_program
    except (AttributeError, ImportError) as error:
        raise ExportError(
            f"transformers {transformers_version} cannot export to the ExecuTorch that is installed "
            f"({reason_of(error)}): pip install --upgrade transformers 'hf_prune[executorch]'"
        ) from error

    examples, tokens = most_examples(model), min(MOST_TOKENS, context_length(model) or MOST_TOKENS)
    free = {} if examples == 1 else {0: torch.export.Dim("examples", min=1, max=examples)}
    of_texts = {**free, 1: torch.export.Dim("tokens", min=1, max=tokens)}
    shapes = {name: of_texts if value.dim() == 2 else free for name, value in inputs.items()}
    largest = {
        name: [examples, tokens] if value.dim() == 2 else [examples, *value.shape[1:]] for name, value in inputs.items()
    }
    try:
        with quiet():
            config = ExecutorchConfig(backend="xnnpack", dynamic=True, dynamic_shapes=shapes)
            program, _ = export(_twin(model), dict(inputs), config)
    except Exception as error:  # torch and ExecuTorch raise many kinds
        raise ExportError(
            f"ExecuTorch cannot take this {type(model).__name__}: {reason_of(error)}; export it to .onnx"
        ) from error

    def save(path: Path) -> None:
        ExecutorchExporter.save_program(program, path)
        write_text(names_file(path), json.dumps({"inputs": largest}, indent=2) + "\n")

    return save


def _twin(model: Any) -> Any:
    """A model of the same weights that returns one tensor, and that the exporter may change as it likes."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    twin = copy.deepcopy(model, memo)
    forward = twin.forward

    @functools.wraps(forward)
    def first(**inputs: Tensor) -> Tensor:
        output: Tensor = first_output(forward(**inputs))
        return output

    twin.forward = first
    return twin
