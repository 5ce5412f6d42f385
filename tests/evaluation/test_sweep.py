"""The sweep: right points, a model that is dense again, and results that are never mixed."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import hf_prune
from hf_prune import (
    Evaluation,
    MaskStore,
    PruningConfig,
    SweepPoint,
    SweepResult,
    classification_batches,
    compare,
    evaluate_classification,
    prune,
    run_sweep,
    sparsity_report,
)
from hf_prune.errors import CalibrationError, ConfigError, PlanError, SweepError
from hf_prune.evaluation import sweep as sweep_module
from tests import models
from tests.models import assert_unchanged, snapshot

TOKENIZER = models.tiny_tokenizer()
DATA = Dataset.from_dict(models.answered_sentences(60))
NAMES = {"results.json", "results.csv", "tradeoff.png"}


@pytest.fixture
def model() -> Any:
    return models.tiny_classifier()


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """The folder of a sweep of :func:`model`."""
    out = tmp_path_factory.mktemp("swept")
    sweep(models.tiny_classifier(), out)
    return out


@pytest.fixture
def scored(monkeypatch) -> list[float]:
    """The sparsity of the model at every evaluation."""
    sparsities: list[float] = []

    def count(model: Any, *args: Any, **kwargs: Any) -> Evaluation:
        sparsities.append(round(sparsity_report(model).target_sparsity, 2))
        return evaluate_classification(model, *args, **kwargs)

    monkeypatch.setattr(sweep_module, "score_model", count)
    return sparsities


def sweep(model: Any, out: Path | None = None, dataset: Dataset = DATA, **options: Any) -> SweepResult:
    return run_sweep(model, TOKENIZER, dataset, out=out, **{"sparsities": [0.3, 0.6], **options})


def batches(model: Any, seed: int = 0) -> list[dict[str, Any]]:
    return classification_batches(DATA, TOKENIZER, n=16, batch_size=8, seed=seed)


# --- points ----------------------------------------------------------------------------------------


def test_points_equal_doing_it_by_hand(model):
    dense = evaluate_classification(copy.deepcopy(model), TOKENIZER, DATA)
    result = sweep(model, sparsities=[0.6, 0.3, 0.9], criteria=["magnitude", "random"], config=PruningConfig(seed=3))
    assert result.dense.predictions == dense.predictions
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert [(p.criterion, p.sparsity) for p in result.points] == [
        (criterion, sparsity) for criterion in ("magnitude", "random") for sparsity in (0.6, 0.3, 0.9)
    ]
    predictions = set()
    for point in result.points:
        fresh = prune(models.tiny_classifier(), point.sparsity, criterion=point.criterion, seed=3)
        by_hand, report = evaluate_classification(fresh, TOKENIZER, DATA), sparsity_report(fresh)
        assert dataclasses.replace(point.evaluation, seconds=0) == dataclasses.replace(by_hand, seconds=0)
        assert point.comparison == compare(dense, by_hand)
        assert point.target_sparsity == report.target_sparsity == pytest.approx(point.sparsity, abs=0.01)
        assert point.model_sparsity == report.model_sparsity
        assert point.remaining == report.remaining
        assert point.prune_seconds >= 0
        predictions.add(point.evaluation.predictions)
    assert len(predictions) > 3


def test_calibrated_criteria(model):
    result = sweep(model, criteria=["magnitude", "taylor"], calibration=batches(model), sparsities=[0.7])
    fresh = prune(models.tiny_classifier(), 0.7, criterion="taylor", calibration=batches(model))
    assert result.points[1].evaluation.predictions == evaluate_classification(fresh, TOKENIZER, DATA).predictions


def test_a_polish_sees_data_of_its_own(model, tmp_path, monkeypatch):
    config = PruningConfig(polish={"epochs": 1, "learning_rate": 0.001})
    more, seen = batches(model, seed=1), []
    monkeypatch.setattr(
        sweep_module, "prune", lambda *args, **given: seen.append(given.get("polish_data")) or prune(*args, **given)
    )
    assert len(sweep(model, tmp_path, config=config, polish_data=more).points) == 2
    assert len(seen) == 4  # the plans, and the prunings
    assert all(given is more for given in seen)
    with pytest.raises(SweepError, match=r"polish_data was '.*', now None"):
        sweep(model, tmp_path, config=config, calibration=batches(model))


def test_other_settings_come_from_the_config(model):
    config = PruningConfig(scope="global", exclude_modules=["classifier"])
    (point,) = sweep(model, config=config, sparsities=[0.5]).points
    fresh = prune(models.tiny_classifier(), config.replace(sparsity=0.5))
    assert point.evaluation.predictions == evaluate_classification(fresh, TOKENIZER, DATA).predictions


def test_evaluation_options_arrive(model):
    result = sweep(model, batch_size=7, max_length=20, source="here", split="dev", text_columns=("sentence",))
    for evaluation in (result.dense, *(p.evaluation for p in result.points)):
        found = (evaluation.batch_size, evaluation.max_length, evaluation.source, evaluation.split)
        assert found == (7, 20, "here", "dev")


def test_sparsity_zero_is_the_dense_model(model, scored):
    result = sweep(model, sparsities=[0, 0.5, 0.0, 0.5])
    assert [p.sparsity for p in result.points] == [0.5]
    assert scored == [0, 0.5]
    assert result.rows()[0]["criterion"] == "dense"


def test_only_the_dense_model(model, tmp_path):
    result = sweep(model, tmp_path, sparsities=[0])
    assert result.points == ()
    assert result.sweet_spot is None
    assert result.verdict() == "Sweet spot: none, since nothing was pruned."
    assert {p.name for p in tmp_path.iterdir()} == NAMES


def test_everything_removed(model):
    (point,) = sweep(model, sparsities=[1]).points
    assert point.target_sparsity == 1
    assert len(set(point.evaluation.predictions)) == 1


# --- the model afterwards --------------------------------------------------------------------------


def test_model_is_dense_again(model):
    model.train()
    before = snapshot(model)
    sweep(model, criteria=["magnitude", "taylor"], calibration=batches(model))
    assert_unchanged(model, before)
    assert MaskStore.of(model) is None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["evaluate", "report", "apply", "calibrate"])
def test_model_is_dense_again_after_an_interruption(model, monkeypatch, tmp_path, where, error):
    before, calls = snapshot(model), 0
    path = {
        "evaluate": "hf_prune.evaluation.sweep.score_model",
        "report": "hf_prune.evaluation.sweep.sparsity_report",
        "apply": "hf_prune.pruning.mask_store.zero_weight",
        "calibrate": "hf_prune.pruning.one_pass.collect_stats",
    }[where]
    module, name = path.rsplit(".", 1)
    real = getattr(__import__(module, fromlist=[name]), name)

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error("stop")
        return real(*args, **kwargs)

    monkeypatch.setattr(path, interrupt)
    with pytest.raises(error, match="stop"):
        sweep(model, tmp_path, criteria=["taylor"], calibration=batches(model))
    assert_unchanged(model, before)
    assert MaskStore.of(model) is None
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


# --- refused before anything is measured -----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"criteria": ["magnitud"]}, ConfigError, r"unknown criterion 'magnitud'.*Did you mean 'magnitude'"),
        (
            {"sparsities": [0.5, 30]},
            ConfigError,
            r"sparsity is 30: expected a share from 0 to 1; did you mean 0.3\?|is 30",
        ),
        ({"criteria": ["magnitude", "taylor"]}, CalibrationError, "'taylor' needs calibration data, and got none"),
        ({"config": PruningConfig(polish="distill")}, CalibrationError, "polish needs calibration data, and got none"),
        ({"polish_data": [{}]}, ConfigError, "polish_data is given, but there is no polish: set polish='distill'"),
        ({"confidence": 95}, ConfigError, "confidence is 95: expected a number between 0 and 1"),
        ({"config": PruningConfig(target_modules=["qery"])}, PlanError, "unknown module 'qery'"),
        ({"config": PruningConfig(granularity="2:4")}, ConfigError, r"sparsity=0.3 contradicts granularity='2:4'.*0.5"),
    ],
)
def test_refused_before_anything_is_measured(model, scored, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        sweep(model, tmp_path / "out", **options)
    assert scored == []
    assert not (tmp_path / "out").exists()


def test_a_pattern_works_at_its_own_sparsity(model):
    (point,) = sweep(model, config=PruningConfig(granularity="2:4"), sparsities=[0.5]).points
    fresh = prune(models.tiny_classifier(), granularity="2:4")
    assert point.evaluation.predictions == evaluate_classification(fresh, TOKENIZER, DATA).predictions


def test_pruned_model_is_refused(model, scored):
    before = snapshot(prune(model, 0.3))
    with pytest.raises(
        SweepError, match="the model has masks: every point is pruned from dense weights; load a dense model"
    ):
        sweep(model)
    assert scored == []
    assert_unchanged(model, before)


# --- resuming --------------------------------------------------------------------------------------


def test_finished_points_are_not_measured_again(model, scored, tmp_path):
    first = sweep(model, tmp_path)
    assert scored == [0, 0.3, 0.6]
    again = sweep(model, str(tmp_path))
    assert scored == [0, 0.3, 0.6]
    assert again.to_dict() == json.loads(json.dumps(first.to_dict()))
    assert {p.name for p in tmp_path.iterdir()} == NAMES


def test_resuming_where_distributions_are_too_many_for_the_file(model, scored, tmp_path, monkeypatch):
    for module in ("divergence", "scores"):
        monkeypatch.setattr(f"hf_prune.evaluation.{module}.MOST_STORED", 10)
    first = sweep(model, tmp_path, sparsities=[0.3])
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["dense"]["distributions"] == values["points"][0]["evaluation"]["distributions"] == []
    before = len(scored)
    assert sweep(model, tmp_path, sparsities=[0.3], max_flips=99).points[0].comparison == first.points[0].comparison
    assert len(scored) == before
    more = sweep(model, tmp_path, sparsities=[0.3, 0.9], max_flips=99)
    assert scored[before:] == [0, 0.9]
    fresh = sweep(model, sparsities=[0.3, 0.9])
    assert [p.comparison for p in more.points] == [p.comparison for p in fresh.points]
    values["points"][0]["comparison"]["divergence"]["kl"] = -1
    (tmp_path / "results.json").write_text(json.dumps(values))
    with pytest.raises(SweepError, match="kl is -1: expected a number of 0 or more"):
        sweep(model, tmp_path, sparsities=[0.3])


def test_resuming_after_an_interruption(model, scored, tmp_path, monkeypatch):
    counted = hf_prune.evaluation.sweep.score_model

    def stop(*args: Any, **kwargs: Any) -> Evaluation:
        if len(scored) == 2:
            raise KeyboardInterrupt
        return counted(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "score_model", stop)
        with pytest.raises(KeyboardInterrupt):
            sweep(model, tmp_path, sparsities=[0.3, 0.5, 0.6])
    assert scored == [0, 0.3]
    resumed = sweep(model, tmp_path, sparsities=[0.3, 0.5, 0.6])
    assert scored == [0, 0.3, 0.5, 0.6]
    whole = sweep(model, sparsities=[0.3, 0.5, 0.6])
    assert [p.evaluation.predictions for p in resumed.points] == [p.evaluation.predictions for p in whole.points]
    assert [p.comparison for p in resumed.points] == [p.comparison for p in whole.points]


def test_more_sparsities_and_criteria_extend_the_table(model, scored, tmp_path):
    sweep(model, tmp_path)
    result = sweep(model, tmp_path, sparsities=[0.5, 0.3], criteria=["random", "magnitude"])
    assert scored == [0, 0.3, 0.6, 0.5, 0.3, 0.5]
    expected = [("random", 0.5), ("random", 0.3), ("magnitude", 0.5), ("magnitude", 0.3), ("magnitude", 0.6)]
    assert [(p.criterion, p.sparsity) for p in result.points] == expected
    assert len(json.loads((tmp_path / "results.json").read_text())["points"]) == 5


def test_calibration_may_come_later_but_not_change(model, scored, tmp_path):
    sweep(model, tmp_path)
    sweep(model, tmp_path, criteria=["taylor"], calibration=batches(model))
    sweep(model, tmp_path, criteria=["magnitude"], sparsities=[0.5])
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(SweepError, match="calibration was '"):
        sweep(model, tmp_path, criteria=["taylor"], sparsities=[0.9], calibration=batches(model, seed=1))
    assert (tmp_path / "results.json").read_bytes() == before
    assert len(scored) == 1 + 2 + 2 + 1


def test_tolerance_and_confidence_may_change(model, scored, tmp_path):
    sweep(model, tmp_path, tolerance=2)
    wide = sweep(model, tmp_path, tolerance=100, confidence=0.5)
    assert len(scored) == 3
    assert wide.sweet_spot.sparsity == 0.6
    assert {p.comparison.confidence for p in wide.points} == {0.5}


def _change_weights(model: Any) -> None:
    with torch.no_grad():
        model.classifier.weight[0, 0] += 1


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"dataset": Dataset.from_dict(models.answered_sentences(60, seed=1))}, r"data was '\w+', now '\w+'"),
    "fewer": ({"dataset": DATA.select(range(50))}, r"n was 60, now 50"),
    "scope": ({"config": PruningConfig(scope="global")}, r"config.scope was 'layer', now 'global'"),
    "seed": ({"config": PruningConfig(seed=1)}, r"config.seed was 0, now 1"),
    "targets": ({"config": PruningConfig(target_modules=["query"])}, r"config.target_modules was 'all-linear', now"),
    "batches": ({"batch_size": 3}, r"evaluation.batch_size was None, now 3"),
    "length": ({"max_length": 20}, r"evaluation.max_length was None, now 20"),
}


@pytest.mark.parametrize("what", [*OTHER, "weights", "dtype", "torch", "hf_prune"])
def test_other_settings_are_refused(model, swept, scored, tmp_path, monkeypatch, what):
    shutil.copytree(swept, tmp_path, dirs_exist_ok=True)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    options, message = OTHER.get(what, ({}, r"weights was '\w+', now '\w+'"))
    if what == "weights":
        _change_weights(model)
    elif what == "dtype":
        model.to(torch.bfloat16)
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
        message = r"versions.torch was '.*', now '9.9'"
    elif what == "hf_prune":
        monkeypatch.setattr(hf_prune, "__version__", "9.9")
        message = r"versions.hf_prune was '.*', now '9.9'"
    with pytest.raises(SweepError, match=rf"results.json holds results of other settings \(.*{message}"):
        sweep(model, tmp_path, **options)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert not scored
    if what not in ("torch", "hf_prune"):
        assert len(sweep(model, tmp_path, restart=True, **options).points) == 2
        assert len(scored) == 3


def test_a_removed_option_is_refused_too(model, tmp_path):
    """What the earlier sweep set, and this one does not, differs as well."""
    sweep(model, tmp_path, max_length=20)
    with pytest.raises(SweepError, match=r"evaluation.max_length was 20, now None"):
        sweep(model, tmp_path)


def test_name_and_source_are_no_settings(model, scored, tmp_path):
    sweep(model, tmp_path, name="a", source="b")
    sweep(model, tmp_path, name="c", source="d")
    assert len(scored) == 3


def _edit(change: Callable[[dict], Any]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        values = json.loads(text)
        change(values)
        return json.dumps(values)

    return edit


DAMAGE: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "truncated": lambda text: text[: len(text) // 2],
    "text": lambda text: "hello",
    "list": lambda text: "[]",
    "number": lambda text: "3",
    "no settings": _edit(lambda v: v.pop("settings")),
    "settings": _edit(lambda v: v.update(settings=[])),
    "no dense": _edit(lambda v: v.pop("dense")),
    "dense": _edit(lambda v: v["dense"].pop("labels")),
    "points": _edit(lambda v: v.update(points=3)),
    "point": _edit(lambda v: v.update(points=["x"])),
    "no evaluation": _edit(lambda v: v["points"][0].pop("evaluation")),
    "evaluation": _edit(lambda v: v["points"][0].update(evaluation=[])),
    "predictions": _edit(lambda v: v["points"][0]["evaluation"].update(predictions=[1])),
}


# What an editor can change that makes a worse model look better: measured things are computed again, or refused.
DAMAGE |= {
    "accuracy": _edit(lambda v: v["points"][0]["evaluation"].update(accuracy=0.999)),
    "dense accuracy": _edit(lambda v: v["dense"].update(accuracy=0.5)),
    "all right": _edit(lambda v: v["points"][1]["evaluation"].update(predictions=v["dense"]["labels"])),
    "labels": _edit(lambda v: [e.update(labels=e["predictions"], accuracy=1.0, standard_error=0.0)
                               for e in [v["dense"], *(p["evaluation"] for p in v["points"])]]),
    "fingerprint": _edit(lambda v: [e.update(data_fingerprint="f")
                                    for e in [v["dense"], *(p["evaluation"] for p in v["points"])]]),
    "remaining": _edit(lambda v: v["points"][0].update(remaining=1)),
    "sparsity": _edit(lambda v: v["points"][0].update(sparsity=7.0)),
    "nan": _edit(lambda v: v["points"][0].update(model_sparsity=float("nan"))),
    "share": _edit(lambda v: v["points"][0].update(target_sparsity=0.0)),
    "seconds": _edit(lambda v: v["points"][0].update(prune_seconds=-1.0)),
    "twice": _edit(lambda v: v["points"].append(v["points"][0])),
    "sparser": _edit(lambda v: v["points"][1].update(sparsity=0.95)),
    "swapped": _edit(lambda v: [v["points"][i].update(sparsity=s) for i, s in ((0, 0.6), (1, 0.3))]),
    "criterion": _edit(lambda v: v["points"][1].update(criterion="\x1b[2J")),
    "no name": _edit(lambda v: v["points"][1].update(criterion=["magnitude"])),
    "another point": _edit(lambda v: v["points"].append({**v["points"][1], "criterion": "random", "sparsity": 0.99})),
    "counts": _edit(lambda v: v["points"][1].update(target_sparsity=0.99, model_sparsity=0.9,
                                                    remaining=v["parameters"] - round(0.9 * v["parameters"]))),
    "targets": _edit(lambda v: v["points"][1].update(target_sparsity=0.9)),
    "truth": _edit(lambda v: v["points"][1].update(prune_seconds=True)),
    "huge": _edit(lambda v: v["points"][1].update(prune_seconds=10**400)),
    "no class": _edit(lambda v: v["points"][1]["evaluation"].update(predictions=[9] * 60, accuracy=0.0,
                                                                    standard_error=0.0)),
    "class text": _edit(lambda v: v["dense"].update(classes=5)),
    "source": _edit(lambda v: v["dense"].update(source=["a"])),
    "length": _edit(lambda v: v["points"][0]["evaluation"].update(max_length="x")),
    "time": _edit(lambda v: v["dense"].update(seconds=-1)),
    "prediction text": _edit(lambda v: v["dense"].update(predictions="x")),
    "version": _edit(lambda v: v.update(format_version=True)),
    "point list": _edit(lambda v: v.update(points={})),
    "calibration": _edit(lambda v: v["settings"].update(calibration="\x1b[2J")),
    "null": lambda text: "null",
    "deep": lambda text: "[" * 100_000,
}  # fmt: skip


def damaged(swept, folder, damage):
    """The results of a sweep, changed."""
    shutil.copytree(swept, folder, dirs_exist_ok=True)
    path = folder / "results.json"
    path.write_text(DAMAGE[damage](path.read_text()))
    return path


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_results_are_refused(model, swept, scored, tmp_path, damage):
    path = damaged(swept, tmp_path, damage)
    before = path.read_bytes()
    with pytest.raises(
        SweepError, match=r"results.json (is not a sweep|holds results of other|has other labels)"
    ) as caught:
        sweep(model, tmp_path)
    assert "\x1b" not in str(caught.value)
    assert path.read_bytes() == before
    assert not scored


@pytest.mark.parametrize("damage", ["deep", "no settings", "accuracy"])  # no JSON, no sweep, wrong numbers
def test_damaged_results_can_be_replaced(model, swept, scored, tmp_path, damage):
    damaged(swept, tmp_path, damage)
    sweep(model, tmp_path, restart=True, overwrite=True)
    assert len(scored) == 3


def test_comparisons_are_computed_again(model, scored, tmp_path):
    first = sweep(model, tmp_path)
    path = tmp_path / "results.json"
    values = json.loads(path.read_text())
    values["points"][0]["comparison"] |= {"drop": -40.5, "upper_bound": -30.0, "doubt": "x"}
    values |= {"sweet_spot": {"criterion": "magnitude", "sparsity": 0.99}, "parameters": 1}
    values["dense"] |= {"classes": "\x1b[31mx", "source": "\x1b[2J", "split": "\x1b[2J"}
    path.write_text(json.dumps(values))
    assert sweep(model, tmp_path) == first
    assert json.loads(path.read_text()) == json.loads(json.dumps(first.to_dict()))
    assert len(scored) == 3


def test_newer_format_is_refused(model, tmp_path):
    sweep(model, tmp_path)
    path = tmp_path / "results.json"
    path.write_text(_edit(lambda v: v.update(format_version=2))(path.read_text()))
    with pytest.raises(SweepError, match="format 2"):
        sweep(model, tmp_path)


# --- the result ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[SweepResult, Path]:
    out = tmp_path_factory.mktemp("sweep")
    names = {"name": "m", "source": "s", "split": "dev"}
    return sweep(models.tiny_classifier(), out, criteria=["magnitude", "random"], **names), out


def test_csv_json_and_table_agree(written):
    result, out = written
    values = json.loads((out / "results.json").read_text())
    rows = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert (out / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "results.csv").read_text() == result.to_csv()
    assert [row["criterion"] for row in rows] == ["dense", "magnitude", "magnitude", "random", "random"]
    table = str(result).splitlines()[2:7]
    for row, line, point in zip(rows[1:], table[1:], values["points"], strict=True):
        assert float(row["sparsity"]) == point["sparsity"]
        assert int(row["remaining"]) == point["remaining"]
        assert float(row["accuracy"]) == pytest.approx(100 * point["evaluation"]["accuracy"])
        assert float(row["drop"]) == pytest.approx(point["comparison"]["drop"])
        assert float(row["drop"]) == pytest.approx(float(rows[0]["accuracy"]) - float(row["accuracy"]))
        assert [float(row["drop_low"]), float(row["drop_high"])] == pytest.approx(point["comparison"]["interval"])
        assert line.startswith(row["criterion"])
        assert f"{float(row['accuracy']):.2f} %" in line
        assert f"{int(row['remaining']):,}" in line
        assert f"{float(row['drop']):.2f} ± {float(row['drop_standard_error']):.2f}" in line
    assert values["settings"]["model"] == "m"
    assert values["dense"]["accuracy"] == result.dense.accuracy
    assert "n = 60 (s dev)" in str(result)
    assert str(result).endswith(result.verdict())


def test_texts_in_csv_are_no_formulas():
    result = result_of(('=HYPERLINK("http://x.org";"a")', 0.5, 0, 40))
    _, row = csv.DictReader(io.StringIO(result.to_csv()))
    assert row["criterion"] == '\'=HYPERLINK("http://x.org";"a")'
    assert float(row["drop"]) == result.points[0].comparison.drop == -4


def test_reversed_labels_have_no_sweet_spot(model, tmp_path, scored):
    """A model that is wrong nearly always gains by pruning: a warning before it, and no sweet spot after it."""
    reversed_ = Dataset.from_dict({"sentence": DATA["sentence"][:], "label": [1 - y for y in DATA["label"]]})
    with pytest.warns(UserWarning, match=r"right on 10.00 % .* class 0 on 50.00 % .*no sweet spot will be named"):
        result = sweep(model, tmp_path, reversed_, tolerance=100)
    assert result.points[-1].comparison.upper_bound < 100
    assert result.sweet_spot is None
    assert str(result).startswith("Warning: the dense model is right on 10.00 %")
    assert result.verdict().startswith("Sweet spot: none is named, since the dense model is right on 10.00 %")
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["sweet_spot"] is None
    assert values["doubt"] == result.doubt == result.points[0].comparison.doubt
    with pytest.warns(UserWarning, match="no sweet spot will be named"):
        assert sweep(model, tmp_path, reversed_, tolerance=100) == result
    assert len(scored) == 3


def test_classes_that_differ_have_no_sweet_spot():
    three = models.tiny_classifier(num_labels=3)
    with pytest.warns(UserWarning, match="the model has 3 classes, and the data 2, of which 0, 1 occur"):
        result = sweep(three, sparsities=[0.3], tolerance=100)
    assert result.sweet_spot is None


def test_json_names_the_sweet_spot(written):
    result, _ = written
    every = dataclasses.replace(result, tolerance=100)
    assert every.to_dict()["sweet_spot"]["sparsity"] == 0.6
    assert dataclasses.replace(result, tolerance=-100).to_dict()["sweet_spot"] is None


def result_of(*points: tuple[str, float, int, int], tolerance: float = 2.0, n: int = 1000) -> SweepResult:
    """Hand-made points: criterion, sparsity, examples that only the dense, and only the pruned model gets right."""

    def evaluation(lost: int, won: int) -> Evaluation:
        dense = 3 * n // 4
        right = [True] * dense + [False] * (n - dense)
        right[:lost], right[dense : dense + won] = [False] * lost, [True] * won
        p, labels = sum(right) / n, tuple(i % 2 for i in range(n))
        predictions = tuple(y if r else 1 - y for y, r in zip(labels, right, strict=True))
        error = math.sqrt(p * (1 - p) / n)
        return Evaluation(p, n, error, predictions, labels, "dev", "s", "0" * 16, 1.0, "float32", 8, 32)

    dense = evaluation(0, 0)
    made = tuple(
        SweepPoint(c, s, s, s / 2, 100, 0.1, evaluation(lost, won), compare(dense, evaluation(lost, won)))
        for c, s, lost, won in points
    )
    return SweepResult({"model": "m"}, 200, dense, made, tolerance, 0.95)


def spot(result: SweepResult) -> tuple[str, float] | None:
    best = result.sweet_spot
    return None if best is None else (best.criterion, best.sparsity)


def test_sweet_spot_is_the_largest_within_the_tolerance():
    result = result_of(("magnitude", 0.3, 0, 0), ("magnitude", 0.5, 8, 3), ("magnitude", 0.8, 100, 2))
    assert spot(result) == ("magnitude", 0.5)
    assert result.verdict().startswith("Sweet spot: 50 % with magnitude")
    assert "tolerance 2" in result.verdict()


def test_sweet_spot_needs_the_bound_not_only_the_drop():
    """A drop of 1 point is within 2, but so many changed examples do not prove it."""
    noisy = result_of(("magnitude", 0.5, 110, 100))
    assert noisy.points[0].comparison.drop == pytest.approx(1)
    assert noisy.points[0].comparison.upper_bound > 2
    assert spot(noisy) is None
    assert spot(dataclasses.replace(noisy, tolerance=4.0)) == ("magnitude", 0.5)
    assert "Sweet spot: none of these. The best bound is at 50 % with magnitude" in noisy.verdict()


def test_sweet_spot_at_the_bound_itself():
    result = result_of(("magnitude", 0.5, 8, 3))
    bound = result.points[0].comparison.upper_bound
    assert spot(dataclasses.replace(result, tolerance=bound)) == ("magnitude", 0.5)
    assert spot(dataclasses.replace(result, tolerance=bound - 1e-9)) is None


def test_sweet_spot_between_criteria_is_the_smaller_drop():
    assert spot(result_of(("random", 0.5, 8, 3), ("taylor", 0.5, 4, 3))) == ("taylor", 0.5)
    assert spot(result_of(("taylor", 0.5, 4, 3), ("random", 0.5, 8, 3))) == ("taylor", 0.5)
    assert spot(result_of(("taylor", 0.5, 4, 3), ("random", 0.6, 8, 3))) == ("random", 0.6)


def test_sweet_spot_of_a_gain_and_of_no_points():
    assert spot(result_of(("magnitude", 0.9, 0, 40))) == ("magnitude", 0.9)
    assert spot(result_of()) is None


def test_sweet_spot_may_lie_beyond_a_bad_point():
    """Each point is judged by itself; the largest that passes wins."""
    assert spot(result_of(("magnitude", 0.3, 100, 0), ("magnitude", 0.5, 1, 0))) == ("magnitude", 0.5)


def test_points_round_trip():
    result = result_of(("magnitude", 0.5, 8, 3))
    (point,) = result.points
    values = json.loads(json.dumps(point.to_dict()))
    assert SweepPoint.from_dict(values, result.dense, 0.95) == point
    assert SweepPoint.from_dict(values, result.dense, 0.5).comparison.upper_bound < point.comparison.upper_bound


@pytest.mark.parametrize("content", ['{"mine": 1}', "not JSON", '{"points": [], "settings": {}}', "[]"])
def test_a_restart_replaces_only_what_a_sweep_wrote(model, tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SweepError, match=r"results.json is not the result of a sweep: .* or pass --overwrite"):
        sweep(model, tmp_path, restart=True)
    assert (tmp_path / "results.json").read_text() == content
    assert sweep(model, tmp_path, restart=True, overwrite=True).points
