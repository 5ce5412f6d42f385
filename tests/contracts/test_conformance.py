"""A sample of the conformance run: types of every family, each in a process forked from one that has imported all."""

import signal

import pytest

from benchmarks import conformance, conformance_checks
from benchmarks.conformance_table import count, share, write_tables

# Encoders, decoders, both; experts packed and in lists; state spaces, delta-nets; vision, sound, towers; convolutions.
SAMPLE = (
    "bert",
    "modernbert",
    "deberta-v2",
    "gpt2",
    "opt",
    "llama",
    "gemma3_text",
    "qwen3",
    "big_bird",
    "t5",
    "bart",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "detr",
    "mamba2",
    "qwen3_next",
    "vit",
    "swin",
    "clip",
    "glm4v",
    "whisper",
    "wav2vec2",
    "resnet",
)
STRUCTURED = ("bert", "gpt2", "opt", "llama", "qwen3", "t5", "vit", "whisper")


@pytest.mark.matrix
@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_type_is_pruned_saved_loaded_and_trained(model_type):
    (result,) = conformance.run({model_type: conformance.CHECKS}, jobs=1, seconds=200, gigabytes=8, warm_up=())
    assert result["built"], result
    checks = result["checks"]
    assert {name: checks[name] for name in ("dense", "compressed", "2:4", "training")} == dict.fromkeys(
        ("dense", "compressed", "2:4", "training"), "passed"
    )
    assert not [text for text in checks.values() if text.startswith("failed")]
    assert (share(result) or 0) >= 0.95
    if model_type in STRUCTURED:
        assert [checks[kind] for kind in ("head", "neuron", "layer")] == ["passed"] * 3
    if model_type in ("mixtral", "gpt_oss"):
        assert checks["expert"] == "passed"


def test_a_type_that_runs_too_long_is_reported(tmp_path):
    (result,) = conformance.run({"bert": ("dense",)}, jobs=1, seconds=0, gigabytes=8, warm_up=())
    assert (result["built"], result["type"]) == (False, "bert")
    assert "more than 0 s" in result["reason"]


def test_checks_that_were_made_are_kept_if_a_later_one_runs_too_long(monkeypatch):
    monkeypatch.setitem(conformance_checks._RUNS, "dense", lambda model, inputs: None)
    monkeypatch.setitem(
        conformance_checks._RUNS, "compressed", lambda model, inputs: signal.raise_signal(signal.SIGALRM)
    )
    checks = ("dense", "compressed", "2:4")  # its time is up in the second
    (result,) = conformance.run({"distilbert": checks}, jobs=1, seconds=10, gigabytes=8, warm_up=())
    assert result["built"]
    assert result["checks"] == {"dense": "passed", "compressed": "took more than 10 s or 8 GB"}
    assert conformance.summary(result).endswith("compressed: took more than 10 s or 8 GB")


def test_tables(tmp_path):
    result = {
        "type": "a", "built": True, "class": "A", "parameters": 200, "matrices": 110, "covered": 80,
        "dense_by_choice": 10, "uncovered": 20, "largest_uncovered": "x.weight", 
        "checks": dict.fromkeys(conformance.CHECKS, "passed"),
    }  # fmt: skip
    result["checks"] |= {"head": "refused: no heads", "compressed": "failed: one tensor differs"}
    none = {"type": "b", "built": False, "reason": "needs timm"}
    slow = {"type": "c", "built": False, "reason": "took more than 60 s or 8 GB"}
    nothing = {**result, "type": "d", "matrices": 10}  # all of it is dense by choice
    counts = count([result, none, slow, nothing])
    assert counts["default targets prune at least 95 % of these"] == 0
    assert counts["with weights in matrices that are not dense by choice"] == 1
    assert counts["took more time or memory than the run allows"] == 1
    assert count([result, none])["heads, neurons, layers or experts can be removed"] == 1
    write_tables([none, result], tmp_path)
    text = (tmp_path / "architectures.md").read_text()
    assert "| `a` | 80 % | in part | yes | – | yes | yes | yes |" in text
    assert "* `a`, compressed: failed: one tensor differs" in text
    assert "* `b`: needs timm" in text
