"""Export masked and shrunk models to other runtimes by ``torch.export``: ONNX, OpenVINO and ExecuTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_prune.architectures.bypass import bypassed_layers
from hf_prune.architectures.switched_off import layers_without_units
from hf_prune.calibration.expert_implementation import experts_by
from hf_prune.conversion.executorch import executorch_program, most_examples
from hf_prune.conversion.exported_graphs import (
    Graph,
    attention_by,
    cached_graph,
    first_output,
    logits_graph,
    quiet,
    reason_of,
)
from hf_prune.conversion.int8 import check_quantizer, write_int8
from hf_prune.errors import ExportError
from hf_prune.inference.backends import SUFFIXES, ExportedModel, names_file, need
from hf_prune.inference.speedup import workload_inputs
from hf_prune.pruning.mask_store import warn_regrown
from hf_prune.utils.files import sync
from hf_prune.utils.forward import eval_mode
from hf_prune.utils.number_formats import refuse_quantized
from hf_prune.utils.offloaded_weights import refuse_offloaded
from hf_prune.utils.output_folder import check_file, warn_replaced
from hf_prune.utils.progress import working
from hf_prune.utils.results import Result

_TOLERANCE = 1e-3  # largest difference from PyTorch, relative to the largest output if that is above 1


@dataclass(frozen=True, repr=False)
class ExportReport(Result):
    """The file that an export wrote, and how close its outputs are. Print it.

    Args:
        path: The file.
        runtime: The runtime that checked it: ``"onnxruntime"``, ``"openvino"`` or ``"executorch"``.
        difference: Largest difference of an output from PyTorch's, on inputs of another size than those of the export;
            of the float32 file, also where another one was written.
        quantized: ``"int8"`` if such a file was written, or None.
        quantized_difference: Its largest difference from PyTorch's outputs, on the same inputs.
        largest_output: The largest of PyTorch's outputs there, by magnitude.
        float_bytes: What the float32 file takes, with the file of its weights.
        bytes: What the written file takes.
    """

    bars = ("difference", "quantized_difference")

    path: Path
    runtime: str
    difference: float
    quantized: str | None = None
    quantized_difference: float | None = None
    largest_output: float | None = None
    float_bytes: int | None = None
    bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "path": str(self.path)}

    def __str__(self) -> str:
        differ = f"its outputs differ from PyTorch's by {self.difference:.1e} at most"
        if self.quantized is None:
            return f"Saved {self.path}; in {self.runtime} {differ}."
        assert self.float_bytes is not None
        assert self.bytes is not None
        return (
            f"Saved {self.path} in {self.quantized}: {self.bytes / 1e6:,.2f} MB, {self.float_bytes / 1e6:,.2f} MB in "
            f"float32.\nIn {self.runtime} its outputs differ from PyTorch's by {self.quantized_difference:.1e} at most "
            f"(the largest is {self.largest_output:.1e}), those in float32 by {self.difference:.1e}."
        )


@working("Exporting")
def export_model(
    model: nn.Module, path: str | Path, *, quantize: str | None = None, cache: bool = False, overwrite: bool = False
) -> ExportReport:
    """Export a model to ONNX, OpenVINO or ExecuTorch, and check the file.

    The suffix of the file decides: ``.onnx``, ``.xml`` (with a ``.bin`` beside it) or ``.pte`` (with a ``.pte.json``
    that names the inputs). The batch size and the number of tokens are free dimensions; in ExecuTorch, which plans its
    memory ahead, up to 8 examples of 512 tokens, or of as many as the model can read, and one example where the model
    continues a text. The logits are the only output, except with ``cache``.

    Before the file is put in place, it is run and compared with PyTorch. A masked model keeps its zeros, and a shrunk
    model its size.

    Args:
        model: A transformers model for text, images or sound, in float32.
        path: The file.
        quantize: ``"int8"`` for int8 matrices of linear layers and embeddings (ONNX by ONNX Runtime's dynamic
            quantization, OpenVINO by NNCF), which changes the outputs: the report says by how much. None for float32.
        cache: For causal language models in ONNX and OpenVINO: the file takes keys and values of earlier tokens, and
            returns them with those of the new tokens, so that :meth:`ExportedModel.generate` reads each token once.
            Their names are those of Optimum and transformers.js, ``past_key_values.0.key`` and ``present.0.key``.
        overwrite: Replace an existing file and the files that belong to it.

    Returns:
        What was written, and how close its outputs are.

    Raises:
        CheckpointError: If the file exists already.
        ExportError: If a package is missing, the suffix is unknown, the model cannot be exported, or keeps no keys and
            values for ``cache``, or the outputs of the float32 file differ from PyTorch's, or those of the int8 file
            are not finite.
        PlanError: If weights are offloaded or quantized.
    """
    path = Path(path)
    refuse_quantized(model)
    if path.suffix not in SUFFIXES:
        raise ExportError(
            f"{path} ends in {path.suffix!r}: expected .onnx, .xml for OpenVINO, or .pte for ExecuTorch; export_gguf() "
            f"writes .gguf"
        )
    beside = {".onnx": path.with_name(f"{path.name}.data"), ".xml": path.with_suffix(".bin"), ".pte": names_file(path)}
    data = beside[path.suffix]
    check_quantizer(path, quantize)
    if cache and path.suffix == ".pte":
        raise ExportError(
            f"{path} cannot have a key-value cache: leave cache=True (--cache) out, or choose .onnx or .xml"
        )
    for file in (path, data):
        check_file(file, overwrite=overwrite)
    if path.suffix == ".pte":
        need("executorch", extra="executorch")
    else:
        need("onnx", "onnxscript", *(("openvino",) if path.suffix == ".xml" else ("onnxruntime",)))
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise ExportError("the model is not in float32, as exported files must be: call model.float() first")
    if bypassed := bypassed_layers(model):
        raise ExportError(f"layers are switched off: {', '.join(bypassed)}; call shrink() first, which removes them")
    if without := layers_without_units(model):
        raise ExportError(f"experts are switched off in {', '.join(without)}; call shrink() first, which removes them")
    refuse_offloaded(model, "export_model()")
    warn_regrown(model, "the exported model is not the one that save_pretrained() writes, in which they are zero")
    inputs = workload_inputs(model, {"batch_size": 2, "length": 8})
    other = workload_inputs(model, {"batch_size": 3, "length": 6})
    if path.suffix == ".pte":
        inputs, other = ({k: v[: most_examples(model)] for k, v in batch.items()} for batch in (inputs, other))
    with _exportable(model):
        if path.suffix == ".pte":
            save = executorch_program(model, inputs)
        else:
            program = _program(model, (cached_graph if cache else logits_graph)(model, inputs))
            save = partial(_save, model, program)
        with torch.no_grad():
            expected = first_output(model(**other))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as name:
        written = Path(name) / path.name
        save(written)
        run = partial(_in_two_steps if cache else _at_once, inputs=other)
        try:
            actual = run(ExportedModel(written))
        except RuntimeError as error:  # of the runtime, which has codes of its own
            raise ExportError(
                f"the exported {type(model).__name__} does not run on a batch of another size than it was traced with "
                f"({reason_of(error)}): nothing was written; export it to another format"
            ) from error
        difference = float((torch.from_numpy(actual) - expected).abs().max())
        runtime = {".onnx": "onnxruntime", ".xml": "openvino", ".pte": "executorch"}[path.suffix]
        if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise ExportError(
                f"the outputs of the exported model in {runtime} differ from PyTorch's by {difference:.2g}: nothing "
                f"was written"
            )
        report = ExportReport(path, runtime, difference)
        if quantize is not None:
            written, report = _quantized(written, quantize, report, run, expected)
        files = [file for file in written.parent.iterdir() if file.is_file()]
        warn_replaced(path.parent, (file.name for file in files))
        for file in sorted(files, key=lambda file: file == written):  # the files that it refers to first
            sync(file)
            file.replace(path.parent / file.name)
    return report


def _save(model: nn.Module, program: Any, path: Path) -> None:
    """Write a traced model to a file for ONNX Runtime or OpenVINO."""
    program.save(str(path.with_suffix(".onnx")))
    if path.suffix == ".onnx":
        return
    import openvino

    try:
        converted = openvino.convert_model(str(path.with_suffix(".onnx")))
    except Exception as error:  # OpenVINO has kinds of its own, with many lines
        empty = "a layer has no heads or neurons left, for which it has no matrices"
        why = empty if _has_empty_weights(model) else reason_of(error)
        raise ExportError(f"OpenVINO cannot convert this model: {why}; export it to .onnx") from error
    openvino.save_model(converted, str(path), False)
    path.with_suffix(".onnx").unlink()


def _quantized(
    written: Path, kind: str, report: ExportReport, run: Callable[[ExportedModel], Any], expected: Tensor
) -> tuple[Path, ExportReport]:
    """A file beside the exported one in a folder of its own, with smaller weights, and what it does."""
    target = written.parent / kind / written.name
    target.parent.mkdir()
    with quiet():
        write_int8(written, target)
    actual = torch.from_numpy(run(ExportedModel(target)))
    if not actual.isfinite().all():
        raise ExportError(f"the outputs of the {kind} model in {report.runtime} are not finite: nothing was written")
    sizes = [sum(file.stat().st_size for file in each.parent.iterdir() if file.is_file()) for each in (written, target)]
    changed = dataclasses.replace(
        report,
        quantized=kind,
        quantized_difference=float((actual - expected).abs().max()),
        largest_output=float(expected.abs().max()),
        float_bytes=sizes[0],
        bytes=sizes[1],
    )
    return target, changed


def _at_once(exported: ExportedModel, inputs: Mapping[str, Tensor]) -> Any:
    return exported(**inputs)


def _in_two_steps(exported: ExportedModel, inputs: Mapping[str, Tensor]) -> Any:
    """The logits of a batch, of which the second half is read with the cache of the first."""
    halves = inputs["input_ids"].chunk(2, dim=1)
    cache, found = exported.empty_cache(len(halves[0])), []
    for half in halves:
        logits, cache = exported.step({"input_ids": half.numpy()}, cache)
        found.append(logits)
    return np.concatenate(found, axis=1)


def _program(model: Any, graph: Graph) -> Any:
    errors = []
    for attention in (None, "eager"):  # fused attention of some models computes shapes that cannot be traced
        with attention_by(model, attention), experts_by("batched_mm", model.modules()), quiet():
            try:
                program = torch.onnx.export(
                    graph.module.eval(),
                    graph.inputs,
                    dynamo=True,
                    input_names=list(graph.input_names),
                    output_names=list(graph.output_names),
                    dynamic_shapes=(graph.free,),
                    verbose=False,
                )
            except Exception as error:  # torch raises many kinds
                errors.append(error)
            else:
                if _has_empty_weights(model):
                    _keep_empty_dimensions(program)
                return program
    raise ExportError(f"torch cannot export this {type(model).__name__}: {reason_of(errors[-1])}") from errors[-1]


def _has_empty_weights(model: nn.Module) -> bool:
    """Whether a layer lost all its heads or neurons."""
    return any(parameter.numel() == 0 for parameter in model.parameters())


def _keep_empty_dimensions(program: Any) -> None:
    """Let a 0 in the shape of a Reshape be a dimension of a layer without heads, and not a copy of the input's."""
    import onnx_ir

    for node in program.model.graph.all_nodes():
        if node.op_type == "Reshape":
            node.attributes["allowzero"] = onnx_ir.AttrInt64("allowzero", 1)


@contextlib.contextmanager
def _exportable(model: Any) -> Iterator[None]:
    """Eval mode without caches, inside the context."""
    config = model.config
    cached = getattr(config, "use_cache", None)
    with eval_mode(model):
        try:
            if cached is not None:
                config.use_cache = False
            yield
        finally:
            if cached is not None:
                config.use_cache = cached
