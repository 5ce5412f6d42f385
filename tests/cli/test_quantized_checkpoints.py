"""Quantized checkpoints: refused by what prunes or counts, before weights are read; others say what is missing."""

from __future__ import annotations

import json

import pytest

from hf_prune.checkpoint import native
from tests import models
from tests.support.command_line import run_command

METHODS = {
    "fp8": {"quant_method": "fp8"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "torchao": {"quant_method": "torchao", "quant_type": "int8_weight_only"},
    "gptq": {"quant_method": "gptq", "bits": 4},
}
COMMANDS = {
    "prune": ["--sparsity", 0.5, "--out", "OUT"],
    "prune --stream": ["--sparsity", 0.5, "--stream", "--out", "OUT"],
    "prune --dry-run": ["--sparsity", 0.5, "--dry-run"],
    "report": [],
    "inspect": [],
    "sweep": ["--sparsity", 0.5, "--data", "DATA", "--out", "OUT"],
    "train": ["--sparsity", 0.5, "--data", "DATA", "--out", "OUT"],
    "lottery": ["--sparsity", 0.5, "--data", "DATA", "--out", "OUT"],
    "export": ["OUT"],
    "accelerate": [],
    "trim-hidden": ["--size", 0.5, "--data", "DATA", "--out", "OUT"],
    "trim-vocab": ["--texts", "DATA", "--out", "OUT"],
    "card": [],
    "verify": [],
    "compress": ["OUT"],
    "migrate": ["OUT", "--adopt-zeros"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    models.tiny_bert().save_pretrained(root / "model")
    models.tiny_tokenizer().save_pretrained(root / "model")
    (root / "data").mkdir()
    for split in ("train", "dev"):
        (root / "data" / f"{split}.tsv").write_text("sentence\tlabel\nw1 w2\t0\nw3\t1\n")
    return root


def quantize(folder, method):
    path = folder / "model" / "config.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "quantization_config": METHODS[method]}))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("method", ["fp8", "bitsandbytes"])
def test_refused_before_weights_are_read(command, method, folder, monkeypatch, capsys, tmp_path):
    quantize(folder, method)
    monkeypatch.setattr(native, "load_pruned", None)  # which would be called with the weights
    places = {"OUT": tmp_path / "out.onnx", "DATA": folder / "data"}
    more = [places.get(word, word) for word in COMMANDS[command]]
    code, _, err = run_command(capsys, command.split()[0], folder / "model", *more)
    assert code == 1
    assert f"is quantized with '{method}': expected" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["evaluate", "--data", "DATA"], ["bench", "--length", "4"]], ids=lambda c: c[0])
@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "gptq"])
def test_what_cannot_be_loaded_here_is_said_in_a_sentence(command, method, folder, monkeypatch, capsys):
    quantize(folder, method)
    name, *more = [folder / "data" if word == "DATA" else word for word in command]
    code, _, err = run_command(capsys, name, folder / "model", *more)
    assert code == 1
    assert "cannot be loaded: " in err
    assert method in err.lower() or "optimum" in err
