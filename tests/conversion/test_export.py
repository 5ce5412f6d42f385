"""Exported files do what PyTorch does, masked and shrunk."""

import json
import os

import pytest
import torch

from hf_prune import ExportError, export_model, measure_latency, prune, shrink
from hf_prune.architectures.bypass import bypass
from hf_prune.cli.main import main
from hf_prune.errors import ConfigError, DataError
from hf_prune.inference.backends import ExportedModel
from tests.architecture_models import tiny


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits.numpy()


@pytest.mark.parametrize(
    ("model_type", "suffix"),
    [
        ("bert", ".onnx"),
        pytest.param("bert", ".xml", marks=pytest.mark.matrix),
        pytest.param("llama", ".onnx", marks=pytest.mark.matrix),
    ],
)
def test_masked_and_shrunk_models_do_the_same_there(model_type, suffix, tmp_path):
    model, inputs = tiny(model_type)
    given = {k: v[:, 2:] if model_type == "llama" else v for k, v in inputs().items()}  # rows of padding are arbitrary
    prune(model, 0.5, granularity=("head", "neuron"))
    masked = export_model(model, tmp_path / f"masked{suffix}")
    shrink(model)
    shrunk = export_model(model, tmp_path / f"shrunk{suffix}")
    assert masked.difference < 1e-5
    assert shrunk.difference < 1e-5
    one = {k: v[:1] for k, v in given.items()}  # of another batch size than it was exported with
    expected = logits(model, one)
    for report in (masked, shrunk):
        assert abs(ExportedModel(report.path, threads=1)(**one) - expected).max() < 1e-5
    sizes = [sum(f.stat().st_size for f in tmp_path.glob(f"{name}.*")) for name in ("masked", "shrunk")]
    assert sizes[1] < sizes[0]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert model.config._attn_implementation == "sdpa"


def test_the_commands(tmp_path, capsys):
    model, _ = tiny("bert")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "model"), str(tmp_path / "m.onnx")])
    assert ended.value.code == 0
    assert "its outputs differ from PyTorch's by" in capsys.readouterr().out


def test_exported_models_are_timed_beside_checkpoints(tmp_path, capsys):
    model, _ = tiny("bert")
    model.save_pretrained(tmp_path / "model")
    exported = ExportedModel(export_model(model, tmp_path / "m.onnx").path)
    result = measure_latency({"torch": model, "onnx": exported}, lengths=[8], rounds=6, warmup=1)
    assert [point.model for point in result.points] == ["torch", "onnx"]
    with pytest.raises(ConfigError, match="name a checkpoint first"):
        measure_latency({"onnx": exported})
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(tmp_path / "model"), str(tmp_path / "m.onnx"), "--length", "8", "--rounds", "3", "--json"])
    assert ended.value.code == 0
    assert [p["model"] for p in json.loads(capsys.readouterr().out)["points"]] == ["model", "m.onnx"]


def test_refusals_write_nothing(tmp_path, monkeypatch):
    model, _ = tiny("bert")
    with pytest.raises(ExportError, match=r"ends in '\.bin': expected \.onnx"):
        export_model(model, tmp_path / "m.bin")
    with pytest.raises(ExportError, match=r"not in float32.*model\.float\(\)"):
        export_model(model.half(), tmp_path / "m.onnx")
    model.float()
    bypass(model.bert.encoder.layer[0])
    with pytest.raises(ExportError, match=r"switched off: bert\.encoder\.layer\.0"):
        export_model(model, tmp_path / "m.onnx")
    other, _ = tiny("bert")
    monkeypatch.setattr("hf_prune.conversion.export._TOLERANCE", 0.0)
    with pytest.raises(ExportError, match="differ from PyTorch's by"):
        export_model(other, tmp_path / "m.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"onnx, onnxscript, onnxruntime is not installed: pip install"):
        export_model(other, tmp_path / "m.onnx")
    assert not os.listdir(tmp_path)
    monkeypatch.undo()
    with pytest.raises(DataError, match="does not exist"):
        ExportedModel(tmp_path / "nothing.onnx")
