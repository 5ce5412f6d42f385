"""The time on sparse kernels on a card: shown as it was measured, refused where it cannot be, and claimed by verify."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import pytest

from hf_prune import DataError, prune, read_card_data, render_card, verify_checkpoint, write_card
from hf_prune.checkpoint.files import CARD_DATA
from hf_prune.hub.card_data import PruningCardData, load_card_data
from hf_prune.hub.checksums import measured_weights
from hf_prune.inference.acceleration.choose import Choice
from hf_prune.inference.acceleration.layer_kinds import LayerKind
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.inference.timing import Ratio
from tests import models
from tests.support.command_line import exit_code


def kind(kernel: str = "sparse:384") -> LayerKind:
    return LayerKind(("a.query",), (32, 32), "float32", 0.9, (Choice(128, kernel, 2e-5, 1e-5, 2.0),))


REPORT = AccelerationReport(
    (kind(),), Ratio(1.874, 1.8, 2.01), 0.045, 0.024, 1.9e-7, 400, 200, 1, 128, 2, {"cpu": "A CPU", "torch": "2.9"}
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards") / "pruned"
    prune(models.tiny_classifier(4), 0.9).save_pretrained(folder)
    assert exit_code("card", folder, "--write") == 0
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "pruned")


def values(report: AccelerationReport = REPORT, **changed) -> dict:
    return {**json.loads(json.dumps(report.to_dict())), **changed}


def text_of(folder, report: AccelerationReport) -> str:
    return render_card(read_card_data(folder, acceleration=report.to_dict()))


def test_the_card_says_what_was_measured_and_how_to_have_it(folder):
    text = text_of(folder, REPORT)
    speed = text.partition("## Speed")[2].partition("<details>")[0]
    assert "| on torch's own kernels | 1 x 128 tokens | 45.0 ms | |" in speed
    assert "| on sparse kernels | 1 x 128 tokens | 24.0 ms | 1.87x (1.80 to 2.01) |" in speed
    assert "A CPU, 2 thread(s), torch 2.9. Kernels: sparse:384." in speed
    assert "The largest change of an output is 1.9e-07 of the largest output." in speed
    assert 'import hf_prune  # pip install "hf_prune[kernel]"' in speed
    assert 'hf_prune.accelerate(model, workload={"batch_size": 1, "length": 128})' in speed
    assert "Nothing was timed" not in text
    assert "**1.9× as fast on sparse kernels," in text


def test_the_line_that_a_reader_runs_says_what_else_was_allowed(folder):
    lower = dataclasses.replace(
        REPORT, kinds=(kind("sliced:bfloat16"),), dtypes=("bfloat16",), tolerance=0.01, difference=0.004, length=0
    )
    line = "hf_prune.accelerate(model, workload={\"batch_size\": 1}, dtypes=['bfloat16'], tolerance=0.01)"
    assert line in text_of(folder, lower)


def test_images_have_no_length(folder):
    speed = text_of(folder, dataclasses.replace(REPORT, length=0))
    assert "| on torch's own kernels | batch of 1 | 45.0 ms | |" in speed
    assert "| on sparse kernels | batch of 1 | 24.0 ms |" in speed
    point = {"model": "dense", "batch_size": 2, "length": 0, "median": 0.1, "against": None}
    how = {"rounds": 9, "threads": 1, "dtype": "float32", "device": "cpu", "torch": "2"}
    timed = read_card_data(folder, latency={"points": [point, {**point, "model": "pruned"}], **how})
    assert "| pruned | batch of 2 | 100.0 ms |" in render_card(timed)


def test_kernels_that_multiply_by_zeros_are_not_called_sparse(folder):
    text = text_of(folder, dataclasses.replace(REPORT, kinds=(kind("compact:onednn"),)))
    assert "| on other kernels | 1 x 128 tokens |" in text
    assert "sparse kernels" not in text


def test_no_gain_is_said(folder):
    none = dataclasses.replace(REPORT, speedup=None, before=0.0, after=0.0, difference=0.0)
    text = text_of(folder, none)
    assert "No other kernels make this model faster on A CPU, 2 thread(s), torch 2.9 (1 x 128 tokens)." in text
    assert "as fast" not in text
    assert "Nothing was timed" not in text


def test_the_speed_against_the_dense_model_comes_first(folder):
    point = {"model": "dense", "batch_size": 1, "length": 8, "median": 0.1, "against": None}
    against = {"value": 1.5, "low": 1.4, "high": 1.6, "is_real": True}
    points = [point, {**point, "model": "pruned", "median": 0.1 / 1.5, "against": against}]
    how = {"rounds": 9, "threads": 1, "dtype": "float32", "device": "cpu", "torch": "2"}
    data = read_card_data(folder, acceleration=values(), latency={"points": points, **how})
    text = render_card(data)
    assert text.index("| pruned | 1 x 8 tokens |") < text.index("| on sparse kernels |")
    assert "**1.5× as fast," in text
    points[1]["against"]["is_real"] = False
    assert "**1.9× as fast on sparse kernels," in render_card(
        dataclasses.replace(data, latency={"points": points, **how})
    )


def test_a_card_keeps_of_a_benchmark_what_it_shows(folder):
    point = {"model": "dense", "batch_size": 1, "length": 8, "median": 0.1, "against": None}
    how = {"rounds": 9, "threads": 1, "dtype": "float32", "device": "cpu", "torch": "2"}
    latency = {"points": [point, {**point, "model": "pruned"}], **how}
    assert read_card_data(folder, latency={**latency, "accelerations": {"pruned": values()}}).latency == latency


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"speedup": {"value": 90.0, "low": 89.0, "high": 91.0}}, "the speed-up is 90.0, and the times give 1.88"),
        ({"speedup": {"value": 90.0, "low": 89.0, "high": 91.0}, "before": 2.16}, "no layer gains more than 2 times"),
        ({"speedup": {"value": 1.9, "low": 0.9, "high": 2.0}}, "expected an interval above 1 around its value"),
        ({"difference": 0.5}, "difference is 0.5: expected at most the tolerance, 0.0001"),
        ({"after": "fast"}, "after is 'fast': expected a number"),
        ({"batch_size": 0}, "batch_size is 0: expected a number from 1"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"machine": {"torch": "2"}}, "found KeyError"),
        ({"machine": {"cpu": "a\x1b[2J"}}, "cpu is .*: expected one line"),
        ({"dtypes": ["'), evil('"]}, "dtypes has .*: expected some of float32"),
        ({"kinds": [{"layers": []}]}, "found KeyError"),
    ],
)
def test_what_cannot_be_true_is_refused(folder, tmp_path, changed, message):
    wrong = values(weights=measured_weights(str(folder)), **changed)
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    for given in (wrong, tmp_path / "wrong.json"):
        with pytest.raises(DataError, match=rf"cannot be true: .*{message}"):
            read_card_data(folder, acceleration=given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": "0" * 64}, "was measured on other weights than those of .* run hf-prune accelerate again"),
        ({}, "does not say that it was measured on the weights of"),
        ({"kinds": None}, "is not what hf-prune accelerate --json printed"),
    ],
)
def test_a_file_of_another_model_is_refused(folder, tmp_path, changed, message):
    (tmp_path / "other.json").write_text(json.dumps(values(**changed)))
    with pytest.raises(DataError, match=message):
        read_card_data(folder, acceleration=tmp_path / "other.json")


@pytest.mark.parametrize(
    ("option", "command"), [("acceleration", "accelerate"), ("latency", "bench"), ("evaluation", "evaluate")]
)
def test_a_folder_and_a_missing_file_are_named(folder, tmp_path, option, command):
    with pytest.raises(DataError, match=rf"^{tmp_path} is a folder: expected a JSON file"):
        read_card_data(folder, **{option: tmp_path})
    with pytest.raises(DataError, match=rf"nothing is missing: expected what hf-prune {command} --json printed$"):
        read_card_data(folder, **{option: tmp_path / "nothing"})


def test_verify_takes_it_as_a_claim_about_these_weights(folder):
    weights = measured_weights(str(folder))
    write_card(folder, read_card_data(folder, acceleration=values(weights=weights)))
    checked = verify_checkpoint(folder)
    assert checked.is_right
    assert "timings on other kernels" in checked.claims
    assert "SHA-256 of the weights of the acceleration" in {fact.name for fact in checked.facts}
    path = folder / CARD_DATA
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "acceleration": {**stored["acceleration"], "before": 0.055}}))
    assert not verify_checkpoint(folder).is_right
    path.write_text(json.dumps({**stored, "acceleration": {**stored["acceleration"], "before": 55}}))
    assert "cannot be true" in str(verify_checkpoint(folder))


def test_it_is_kept_with_the_card_and_earlier_cards_have_none(folder):
    write_card(folder, read_card_data(folder, acceleration=values(weights=measured_weights(str(folder)))))
    assert read_card_data(folder, license="mit").acceleration == load_card_data(folder).acceleration
    stored = json.loads((folder / CARD_DATA).read_text())
    del stored["acceleration"]
    assert PruningCardData.from_dict(stored).acceleration is None


def test_a_compressed_checkpoint_keeps_it(folder, tmp_path):
    write_card(folder, read_card_data(folder, acceleration=values(weights=measured_weights(str(folder)))))
    assert exit_code("compress", folder, tmp_path / "packed") == 0
    kept = load_card_data(tmp_path / "packed").acceleration
    assert kept["weights"] == measured_weights(str(tmp_path / "packed")) != measured_weights(str(folder))
    assert kept["speedup"] == values()["speedup"]


def test_from_measuring_to_the_card(folder, tmp_path, capsys):
    """Nothing is faked here: whatever the machine says is on the card, and verify agrees."""
    capsys.readouterr()
    assert exit_code("accelerate", folder, "--length", "8", "--threads", "1", "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    (tmp_path / "printed.json").write_text(json.dumps(measured))
    assert exit_code("card", folder, "--acceleration", tmp_path / "printed.json", "--write") == 0
    text = (folder / "README.md").read_text()
    assert ("| 1 x 8 tokens |" in text) == (measured["speedup"] is not None)
    assert measured["machine"]["cpu"].split()[0] in text
    assert exit_code("verify", folder) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="a processor is named by /proc/cpuinfo")
def test_what_accelerate_writes_is_what_it_prints(folder, tmp_path, capsys):
    capsys.readouterr()
    assert exit_code("accelerate", folder, "--length", "8", "--out", tmp_path / "saved.json", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "saved.json").read_text()) == printed
    assert printed["weights"] == measured_weights(str(folder))
