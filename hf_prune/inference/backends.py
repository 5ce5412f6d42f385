"""Run exported models with ONNX Runtime, OpenVINO or ExecuTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_prune.errors import DataError, ExportError
from hf_prune.utils.json_files import read_json_object

SUFFIXES = (".onnx", ".xml", ".pte")
PAST = "past_key_values."  # how the names of a cache's inputs begin: past_key_values.0.key, past_key_values.0.value, …
PRESENT = "present."  # and those of the outputs that hold the longer cache

_Arrays = dict[str, Any]
_DTYPES = {
    "i": np.int64,
    "u": np.int64,
    "b": np.int64,
    "f": np.float32,
}  # of what a traced model reads, by NumPy's kind


class ExportedModel:
    """An exported model on the CPU, called with tensors by name; returns an array.

    A file with a key-value cache starts from an empty one when it is called.

    Args:
        path: An ``.onnx``, ``.xml`` or ``.pte`` file.
        threads: How many threads it uses; None leaves that to the runtime. ExecuTorch has one number for all models.

    Raises:
        DataError: If the file does not exist, or that with the names of its inputs.
        ExportError: If the runtime is not installed.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise DataError(f"{path} does not exist: expected an exported model")
        start = {".xml": _openvino, ".pte": _executorch}.get(self.path.suffix, _onnx)
        self._run, self._inputs, self._outputs = start(self.path, threads)

    def __call__(self, **inputs: Tensor) -> Any:
        """The logits, a NumPy array."""
        arrays = {name: value.cpu().numpy() for name, value in inputs.items()}
        cache = self.empty_cache(len(arrays["input_ids"])) if self.has_cache else {}
        return self.step(arrays, cache)[0]

    @property
    def has_cache(self) -> bool:
        """Whether the file takes and returns keys and values of earlier tokens."""
        return any(name.startswith(PAST) for name in self._inputs)

    def empty_cache(self, batch_size: int) -> _Arrays:
        """Keys and values of no tokens, by the names of the inputs."""
        return {
            name: np.zeros((batch_size, shape[1], 0, shape[3]), np.float32)
            for name, shape in self._inputs.items()
            if name.startswith(PAST)
        }

    def step(self, inputs: Mapping[str, Any], cache: Mapping[str, Any]) -> tuple[Any, _Arrays]:
        """Run tokens that follow those of a cache.

        Args:
            inputs: Arrays by name. An attention mask has the tokens of the cache as well; it is of ones, and positions
                follow those of the cache, where they are left out.
            cache: From :meth:`empty_cache`, or of the step before.

        Returns:
            The first output, which are the logits, and the cache with the new tokens.
        """
        given = {**inputs, **cache}
        if cache:
            batch, new = given["input_ids"].shape
            past = next(iter(cache.values())).shape[2]
            given.setdefault("attention_mask", np.ones((batch, past + new), np.int64))
            given.setdefault("position_ids", np.arange(past, past + new)[None].repeat(batch, 0))
        results = self._run({name: value for name, value in given.items() if name in self._inputs})
        by_name = dict(zip(self._outputs, results, strict=True))
        return results[0], {name: by_name[PRESENT + name.removeprefix(PAST)] for name in cache}

    def generate(self, input_ids: Tensor, new_tokens: int) -> Any:
        """Continue prompts of one length, always with the likeliest token, and without an end.

        Args:
            input_ids: Prompts, of shape (batch, tokens).
            new_tokens: How many tokens to add to each.

        Returns:
            Prompts and new tokens, a NumPy array of shape (batch, tokens + new_tokens).

        Raises:
            ExportError: If the file has no key-value cache.
        """
        if not self.has_cache:
            raise ExportError(
                f"{self.path} has no key-value cache, so it cannot generate: write it with export_model(cache=True), "
                f"or hf-prune export --cache"
            )
        tokens = [input_ids.cpu().numpy()]
        cache = self.empty_cache(len(input_ids))
        for _ in range(new_tokens):
            logits, cache = self.step({"input_ids": tokens[-1]}, cache)
            tokens.append(logits[:, -1:].argmax(-1))
        return np.concatenate(tokens, axis=1)


_Started = tuple[Callable[[_Arrays], Sequence[Any]], dict[str, Sequence[Any]], list[str]]


def _onnx(path: Path, threads: int | None) -> _Started:
    """How to run a file, the shapes of its inputs by name, and the names of its outputs."""
    need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in session.get_inputs()}
    return lambda inputs: session.run(None, inputs), shapes, [value.name for value in session.get_outputs()]


def _openvino(path: Path, threads: int | None) -> _Started:
    need("openvino")
    import openvino

    settings: dict[str, Any] = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    shapes: dict[str, Sequence[Any]] = {
        name: [dim.get_length() if dim.is_static else str(dim) for dim in value.partial_shape]
        for value in compiled.inputs
        for name in value.names
    }
    names = [next(iter(value.names), "") for value in compiled.outputs]
    return lambda inputs: list(compiled(inputs).values()), shapes, names


def names_file(path: Path) -> Path:
    """The file beside an ExecuTorch program that names its inputs, which the program knows by their order alone."""
    return path.with_name(f"{path.name}.json")


def _executorch(path: Path, threads: int | None) -> _Started:
    need("executorch", extra="executorch")
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    names = read_json_object(names_file(path), DataError, "what export_model() writes beside a .pte file")
    shapes = names.get("inputs")
    if not isinstance(shapes, dict) or not shapes:
        raise DataError(f"{names_file(path)} has no names of inputs: write {path.name} again with export_model()")
    if threads is not None:  # of the whole process; nothing of it runs in the meantime
        _unsafe_reset_threadpool(threads)
    method = Runtime.get().load_program(path).load_method("forward")

    def run(inputs: _Arrays) -> list[Any]:
        found = {name: [*value.shape] for name, value in inputs.items()}
        if found.keys() != shapes.keys() or any(not _fits(found[name], most) for name, most in shapes.items()):
            raise DataError(f"{path.name} was given inputs of shapes {found}: expected at most {dict(shapes)}")
        given = [np.ascontiguousarray(inputs[name], _DTYPES.get(inputs[name].dtype.kind)) for name in shapes]
        return [output.numpy() for output in method.execute([torch.from_numpy(value) for value in given])]

    return run, shapes, ["logits"]


def _fits(shape: Sequence[int], most: Sequence[int]) -> bool:
    """Whether an array is of a shape that memory was planned for."""
    return len(shape) == len(most) and all(size <= limit for size, limit in zip(shape, most, strict=True))


def need(*packages: str, extra: str | None = None) -> None:
    """Make sure that some packages are installed.

    Args:
        *packages: Their names.
        extra: The extra of ``hf_prune`` that has them; None for those of ONNX and OpenVINO.

    Raises:
        ExportError: If one is not.
    """
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        hint = "'hf_prune[onnx]', or 'hf_prune[openvino]' for .xml files" if extra is None else f"'hf_prune[{extra}]'"
        raise ExportError(f"{', '.join(missing)} is not installed: pip install {hint}")
