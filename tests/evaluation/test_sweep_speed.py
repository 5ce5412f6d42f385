"""Speed-ups in a sweep: measured once at every point, on one workload, and shown wherever the sweep is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset

from hf_prune import AccelerationReport, SweepPoint, SweepResult, run_sweep, sparsity_report
from hf_prune.errors import ConfigError, SweepError
from hf_prune.evaluation import sweep as sweep_module
from hf_prune.evaluation.tradeoff_plots import plot_speed
from hf_prune.inference.acceleration.machine import this_machine
from hf_prune.inference.timing import Ratio
from tests import models
from tests.models import assert_unchanged, snapshot

DATA = Dataset.from_dict(models.answered_sentences(60))
WORKLOAD = {"batch_size": 2, "length": 8, "threads": 1}


def report(ratio: float | None = 2.0, **changed: Any) -> AccelerationReport:
    """What a measurement with :data:`WORKLOAD` could have found."""
    machine = {**this_machine(), "threads": "1"}
    values = {"kinds": (), "speedup": ratio and Ratio(ratio, ratio - 0.1, ratio + 0.1), "difference": 1e-7,
              "before": ratio or 0.0, "after": 1.0 if ratio else 0.0, "bytes_before": 9, "bytes_after": 5,
              "batch_size": 2, "length": 8, "threads": 1, "machine": machine}  # fmt: skip
    return AccelerationReport(**(values | changed))


@pytest.fixture
def timed(monkeypatch) -> list[float]:
    """The share of zeros at every measurement; nothing is timed, and above 50 % the model is twice as fast."""
    shares: list[float] = []

    def measure(model: Any, workload: Any, progress: Any) -> AccelerationReport:
        assert workload == WORKLOAD
        shares.append(round(sparsity_report(model).target_sparsity, 1))
        return report(2.0 if shares[-1] > 0.5 else None)

    monkeypatch.setattr(sweep_module, "measure_acceleration", measure)
    return shares


@pytest.fixture
def scored(monkeypatch) -> list[str]:
    """A mark for every evaluation."""
    marks: list[str] = []
    score = sweep_module.score_model
    monkeypatch.setattr(sweep_module, "score_model", lambda *a, **k: marks.append("scored") or score(*a, **k))
    return marks


def sweep(out: Path | None = None, *, accelerate: Any = WORKLOAD, **options: Any) -> SweepResult:
    options = {"sparsities": [0.3, 0.6], "name": "m", **options}
    model = models.tiny_classifier()
    return run_sweep(model, models.tiny_tokenizer(), DATA, out=out, accelerate=accelerate, **options)


def test_the_dense_model_and_every_point_are_measured_once(timed, tmp_path):
    result = sweep(tmp_path)
    assert timed == [0, 0.3, 0.6]
    assert [p.acceleration.gain.value for p in result.points] == [1, 2]
    assert result.dense_acceleration.gain.value == 1
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "results.csv", "tradeoff.png", "speed.png"}
    assert sweep(tmp_path) == result
    assert timed == [0, 0.3, 0.6]


def test_it_is_in_every_form_of_the_result(timed, tmp_path):
    result = sweep(tmp_path)
    point = json.loads((tmp_path / "results.json").read_text())["points"][1]
    assert point["acceleration"]["speedup"] == {"value": 2.0, "low": 1.9, "high": 2.1}
    assert {key: point["acceleration"][key] for key in WORKLOAD} == WORKLOAD
    assert SweepPoint.from_dict(point, result.dense, 0.95) == result.points[1]
    columns = ["speedup", "speedup_low", "speedup_high", *WORKLOAD]
    for table in (result.to_pandas(), pd.read_csv(tmp_path / "results.csv")):
        assert table[columns].values.tolist() == [[1, 1, 1, 2, 8, 1], [1, 1, 1, 2, 8, 1], [2, 1.9, 2.1, 2, 8, 1]]
    assert "<th>speedup low</th>" in result._repr_html_()
    lines = str(result).splitlines()
    assert lines[0].endswith("speed-up")
    assert lines[2].endswith("1 (no gain)")
    assert lines[4].endswith("2.00 (1.90 to 2.10)")
    assert f"95 % interval; 2 x 8 tokens, threads: 1, {this_machine()['cpu']}." in str(result)


def test_without_it_nothing_is_shown(tmp_path):
    result = sweep(tmp_path, accelerate=False)
    assert "acceleration" not in (tmp_path / "results.json").read_text()
    assert "speed" not in str(result) + result.to_csv()
    assert not (tmp_path / "speed.png").exists()
    with pytest.raises(SweepError, match=r"no speed-up was measured: sweep again with --accelerate"):
        result.plot_speed()


def test_earlier_points_are_measured_without_scoring_them_again(timed, scored, tmp_path):
    before = sweep(tmp_path, accelerate=False)
    assert (len(scored), timed) == (3, [])
    after = sweep(tmp_path, sparsities=[0.6, 0.9])
    assert len(scored) == 4
    assert timed == [0, 0.6, 0.9]
    assert [p.acceleration is None for p in after.points] == [False, False, True]  # 30 % was not asked for
    assert after.points[0].evaluation == before.points[1].evaluation
    assert after.points[0].prune_seconds == before.points[1].prune_seconds
    assert str(after).splitlines()[5].endswith(" -")
    again = sweep(tmp_path, accelerate=False)
    assert [p.acceleration for p in again.points] == [None, after.points[0].acceleration, after.points[1].acceleration]


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        ({**WORKLOAD, "batch_size": 1}, "batch_size was 2, now 1"),
        ({**WORKLOAD, "length": 4}, "length was 8, now 4"),
        ({**WORKLOAD, "threads": 3}, "threads was 1, now 3"),
    ],
)
def test_another_workload_is_refused_and_measured_after_a_restart(timed, scored, tmp_path, workload, message):
    sweep(tmp_path)
    before, marks = (tmp_path / "results.json").read_bytes(), len(scored)
    with pytest.raises(SweepError, match=rf"another workload or machine \({message}\).* or pass --restart"):
        sweep(tmp_path, sparsities=[0.9], accelerate=workload)
    assert (tmp_path / "results.json").read_bytes() == before
    assert (len(scored), len(timed)) == (marks, 3)
    sweep(tmp_path, restart=True)
    assert len(timed) == 6


def test_another_machine_is_refused(timed, tmp_path, monkeypatch):
    sweep(tmp_path)
    monkeypatch.setattr("hf_prune.evaluation.sweep_speed.this_machine", lambda: {**this_machine(), "cpu": "another"})
    with pytest.raises(SweepError, match=r"\(cpu was .*, now another\)"):
        sweep(tmp_path)


def test_a_restart_without_speeds_deletes_our_picture_alone(timed, tmp_path):
    sweep(tmp_path)
    sweep(tmp_path, accelerate=False, restart=True)
    assert not (tmp_path / "speed.png").exists()
    (tmp_path / "speed.png").write_bytes(b"mine")
    sweep(tmp_path, accelerate=False, restart=True)
    assert (tmp_path / "speed.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "wrong", [{"batch": 1}, {"prompt": 8}, {"length": 0}, {"threads": True}, {"length": 8.0}, "yes", None]
)
def test_what_is_no_workload_is_refused(scored, tmp_path, wrong):
    with pytest.raises(ConfigError, match=r"accelerate is .*: expected True, or whole numbers from 1 on of batch_size"):
        sweep(tmp_path / "out", accelerate=wrong)
    assert not scored
    assert not (tmp_path / "out").exists()


def test_a_length_that_the_model_cannot_read_is_refused_before_anything_is_scored(scored):
    with pytest.raises(ValueError, match="a workload of length 100000 is longer than the"):
        sweep(accelerate={"length": 100_000})
    assert not scored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speedup": {"value": 50.0, "low": 49.0, "high": 51.0}}, "the speed-up is 50.0, and the times give 2"),
        ({"speedup": {"value": 2.0, "low": 2.1, "high": 2.2}}, "expected an interval above 1 around its value"),
        ({"speedup": {"value": 0.5, "low": 0.4, "high": 0.6}}, "expected an interval above 1"),
        ({"speedup": {"value": 2.0, "low": 1.9, "high": 1e999}}, "expected an interval above 1"),
        ({"speedup": {"value": 2.0}}, "found KeyError"),
        ({"after": -1.0}, "after is -1.0: expected a number from 0"),
        ({"after": 0.0}, "after 0.0: expected seconds above 0"),
        ({"difference": float("nan")}, "difference is nan: expected a number from 0 to 1"),
        ({"threads": 0}, "threads is 0: expected a number from 1"),
        ({"length": "x"}, "length is 'x'"),
        ({"machine": {}}, "found KeyError"),
        ({"kinds": [{}]}, "found KeyError"),
    ],
)
def test_edited_speeds_are_refused(timed, tmp_path, change, message):
    sweep(tmp_path)
    path = tmp_path / "results.json"
    values = json.loads(path.read_text())
    values["points"][1]["acceleration"].update(change)
    path.write_text(json.dumps(values))
    with pytest.raises(SweepError, match=rf"results.json is not a sweep result: an acceleration .*{message}"):
        sweep(tmp_path)


def test_a_measurement_leaves_the_model_and_its_parameters(tmp_path):
    """Nothing is faked here: kernels are chosen, timed and taken off again."""
    model = models.tiny_classifier()
    before, parameters, threads = snapshot(model), list(model.parameters()), torch.get_num_threads()
    tokenizer = models.tiny_tokenizer()
    result = run_sweep(model, tokenizer, DATA, out=tmp_path, sparsities=[0.9], accelerate={"length": 8, "threads": 1})
    assert_unchanged(model, before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.get_num_threads() == threads
    measured = result.points[0].acceleration
    assert (measured.batch_size, measured.length, measured.threads) == (1, 8, 1)
    assert measured.kinds
    read = json.loads((tmp_path / "results.json").read_text())["points"][0]["acceleration"]
    assert AccelerationReport.from_dict(read) == measured


# --- the picture -----------------------------------------------------------------------------------


def test_the_picture_shows_scores_and_speeds_with_their_intervals(timed):
    result = copy.copy(sweep(sparsities=[0.3, 0.6, 0.9]))
    (axes,) = result.plot_speed().axes
    (line,) = axes.containers
    dense = 100 * result.dense.value
    scores = [100 * p.evaluation.value for p in result.points]
    assert line.lines[0].get_xydata().tolist() == [[1, dense], *map(list, zip([1, 2, 2], scores, strict=True))]
    across = line.lines[2][0].get_segments()
    assert [segment[:, 0].tolist() for segment in across] == [[1, 1], [1, 1], [1.9, 2.1], [1.9, 2.1]]
    assert {"30 %", "60 %", "90 %", "magnitude"} <= {text.get_text() for text in axes.texts}
    assert "2 x 8 tokens, threads: 1" in axes.get_title()
    name = next(text for text in axes.texts if text.get_text() == "magnitude")
    assert name.xyann[0] > 2.1  # beside the interval
    assert result.plot().axes[0].get_xlabel() == "sparsity of the targets (%)"


def test_points_without_a_speed_are_left_out_of_the_picture(timed, tmp_path):
    sweep(tmp_path, accelerate=False)
    result = sweep(tmp_path, sparsities=[0.6])
    (axes,) = result.plot_speed().axes
    assert len(axes.containers[0].lines[0].get_xydata()) == 2
    (empty,) = plot_speed(0.9, None, [], None, "m", "here").axes
    assert not empty.containers
