"""Exported models with int8 weights: ONNX files by ONNX Runtime, those of OpenVINO by NNCF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_prune.errors import ExportError
from hf_prune.inference.backends import need

CHOICES = ("int8",)
# Of linear layers and embeddings: ONNX Runtime has no convolution with int8 weights.
_OPERATIONS = ("MatMul", "Gather")


def check_quantizer(path: Path, quantize: str | None) -> None:
    """Make sure that a file can be quantized as asked for.

    Raises:
        ExportError: If the kind is unknown, or a package is missing.
    """
    if quantize is None:
        return
    if quantize not in CHOICES:
        raise ExportError(f"quantize is {quantize!r}: expected None or one of {', '.join(map(repr, CHOICES))}")
    if path.suffix == ".pte":
        raise ExportError(
            f"{path} cannot be written with int8 weights: leave quantize (--quantize) out, or export to .onnx or .xml"
        )
    if path.suffix == ".xml":
        try:
            need("nncf")
        except ExportError:
            raise ExportError(
                "nncf is not installed, which quantizes OpenVINO files: pip install nncf, or export to .onnx, which "
                "ONNX Runtime quantizes"
            ) from None


def write_int8(source: Path, target: Path) -> None:
    """Write an exported file once more, with the matrices of linear layers and embeddings in int8.

    Zeros stay zeros: matrices are rounded symmetrically, with one scale for each output. ONNX Runtime stores an
    embedding with a single scale and a zero point, and rounds what matrices are multiplied with as it comes, to uint8
    (dynamic quantization); NNCF rounds weights alone.

    Args:
        source: The float32 file.
        target: Where to write, of the same suffix.
    """
    if target.suffix == ".xml":
        _by_nncf(source, target)
    else:
        _by_onnxruntime(source, target)


def _by_onnxruntime(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    apart = source.with_name(f"{source.name}.data").exists()  # weights of more than 2 GB
    inferred = target.with_name(f"inferred-{target.name}")
    quant_pre_process(
        str(source), str(inferred), skip_optimization=True, skip_symbolic_shape=True, save_as_external_data=apart
    )
    quantize_dynamic(
        str(inferred),
        str(target),
        op_types_to_quantize=list(_OPERATIONS),
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,  # processors without VNNI add products of eight bits in sixteen, which overflow
        use_external_data_format=apart,
    )
    for file in target.parent.glob(f"{inferred.name}*"):
        file.unlink()


def _by_nncf(source: Path, target: Path) -> None:
    import nncf
    import openvino

    model: Any = openvino.Core().read_model(str(source))
    openvino.save_model(nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM), str(target), False)
