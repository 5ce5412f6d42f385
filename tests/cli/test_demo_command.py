"""The demo command on a tiny model: its table, its picture, and what it says where there is no compiler."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from hf_prune import PruningConfig
from hf_prune.cli.main import main
from hf_prune.cli.workflows import demo as workflow
from hf_prune.kernels.sparse.build import kernel_problem
from tests import models


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A tiny classifier in place of the demo's, pruned with settings that suit its size."""
    models.save_classifier_and_data(tmp_path, seed=4)
    rows = models.answered_sentences(40, 1, models.tiny_classifier(seed=4))
    lines = [f"{text}\t{label}" for text, label in zip(rows["sentence"], rows["label"], strict=True)]
    (tmp_path / "data" / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    found = SimpleNamespace(model_dir=tmp_path / "dense", data_dir=tmp_path / "data")
    monkeypatch.setattr("hf_prune.cli.demo.assets.prepare_demo", lambda echo: found)
    configs = {
        workflow.TEXTBOOK: PruningConfig(sparsity=0.5),
        workflow.BEST: PruningConfig(sparsity=0.8, criterion="wanda", scope="row"),
        workflow.FASTER: PruningConfig(granularity=("head", "neuron"), target_params=0.8),
    }
    monkeypatch.setattr(workflow, "CONFIGS", configs)
    monkeypatch.setattr(workflow, "ROUNDS", 3)
    monkeypatch.setattr(workflow, "LENGTH", 8)
    return found


def run(capsys, *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["demo", *map(str, arguments)])
    assert not ended.value.code
    return capsys.readouterr().out


def test_the_demo_ends_with_a_table_a_picture_and_the_next_command(assets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workflow, "kernel_problem", lambda: "no compiler")
    said = run(capsys, "--out", tmp_path / "out")
    rows = [line for line in said.splitlines() if "% ±" in line]
    assert [row.split("  ")[0] for row in rows] == [workflow.DENSE, *workflow.CONFIGS]
    assert all("MB" in row or "kB" in row for row in rows)
    assert all(" ms" in row for row in rows)
    assert "Not on our sparse kernel: no compiler." in said
    assert "auto MODEL --data DATA --goal faster" in said
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "demo.png", "magnitude-50", "best-80", "best-80-packed", "twice-as-fast"
    }  # fmt: skip


def test_the_numbers_are_those_of_the_files(assets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workflow, "kernel_problem", lambda: "no compiler")
    values = json.loads(run(capsys, "--out", tmp_path / "out", "--json"))
    sizes = {row["model"]: row["megabytes"] * 1e6 for row in values["results"]}
    packed = tmp_path / "out" / "best-80-packed" / "model.safetensors"
    assert sizes[workflow.BEST] == pytest.approx(packed.stat().st_size)
    assert sizes[workflow.FASTER] < sizes[workflow.DENSE]
    assert [row["speedup"] is None for row in values["results"]] == [True, False, False, False]
    assert all(0 <= row["accuracy"] <= 1 and row["n"] == values["results"][0]["n"] for row in values["results"])


def test_the_sparse_kernel_has_a_row_of_its_own(assets, tmp_path, capsys):
    if (problem := kernel_problem()) is not None:
        pytest.skip(problem)
    rows = json.loads(run(capsys, "--out", tmp_path / "out", "--json"))["results"]
    assert [row["model"] for row in rows] == [workflow.DENSE, *workflow.CONFIGS, workflow.SPARSE]
    assert rows[-1]["accuracy"] == rows[2]["accuracy"]
    assert rows[-1]["megabytes"] == rows[2]["megabytes"]
