"""hf-prune accelerate, from end to end on a tiny checkpoint."""

import json

import pytest

from hf_prune import prune
from hf_prune.cli.main import main
from hf_prune.kernels.sparse.build import kernel_problem
from tests import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if (problem := kernel_problem()) is not None:
        pytest.skip(problem)
    path = tmp_path_factory.mktemp("accelerate") / "pruned"
    prune(models.tiny_classifier(4), 0.9).save_pretrained(path)
    return path


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as ended:
        main(["accelerate", *map(str, arguments)])
    assert ended.value.code == code


def test_it_prints_what_it_measured_and_writes_the_choice(folder, tmp_path, capsys):
    out = tmp_path / "acceleration.json"
    run(folder, "--length", 8, "--threads", 1, "--out", out)
    printed = capsys.readouterr().out
    assert "kernel" in printed
    assert any(answer in printed for answer in ("End to end", "the model does not", "No layer gains"))
    saved = json.loads(out.read_text())
    assert saved["threads"] == 1
    assert f"in Python: torch.set_num_threads(1); model.accelerate(saved='{out}')\n" in printed
    run(folder, "--length", 8, "--out", out, code=1)
    assert "exists" in capsys.readouterr().err


def test_the_next_step_allows_what_the_command_allowed(folder, tmp_path, capsys):
    out = tmp_path / "acceleration.json"
    run(folder, "--length", 8, "--dtypes", "bfloat16", "--tolerance", 0.5, "--out", out)
    printed = capsys.readouterr().out
    assert f"in Python: model.accelerate(saved='{out}', dtypes=['bfloat16'], tolerance=0.5)\n" in printed


def test_json(folder, capsys):
    run(folder, "--length", 8, "--json")
    values = json.loads(capsys.readouterr().out)
    assert {"kinds", "speedup", "machine", "difference"} <= values.keys()


def test_an_unknown_precision_is_named(folder, capsys):
    run(folder, "--dtypes", "float8", code=1)
    assert "expected some of float32, bfloat16" in capsys.readouterr().err
