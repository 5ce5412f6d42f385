"""Run exported models with ONNX Runtime or OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from hf_prune.errors import DataError, ExportError

SUFFIXES = (".onnx", ".xml")


class ExportedModel:
    """An exported model on the CPU, called with tensors by name; returns an array.

    Args:
        path: An ``.onnx`` or ``.xml`` file.
        threads: How many threads it uses; None leaves that to the runtime.

    Raises:
        DataError: If the file does not exist.
        ExportError: If the runtime is not installed.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise DataError(f"{path} does not exist: expected an exported model")
        self._run = self._openvino(threads) if self.path.suffix == ".xml" else self._onnx(threads)

    def __call__(self, **inputs: Tensor) -> Any:
        """The logits, a NumPy array."""
        return self._run({name: value.cpu().numpy() for name, value in inputs.items()})

    def _onnx(self, threads: int | None) -> Any:
        need("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        return lambda inputs: session.run(None, {k: v for k, v in inputs.items() if k in names})[0]

    def _openvino(self, threads: int | None) -> Any:
        need("openvino")
        import openvino

        settings: dict[str, Any] = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        settings["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = openvino.Core().compile_model(str(self.path), "CPU", settings)
        names = {name for value in compiled.inputs for name in value.names}
        return lambda inputs: compiled({k: v for k, v in inputs.items() if k in names})[0]


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
