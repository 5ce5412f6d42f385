"""auto_prune(): the ladder of candidates, what is kept on disk, resuming, and what is said."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_prune import (
    AutoPrunedModelForSequenceClassification,
    BudgetError,
    CheckpointError,
    ClassificationTask,
    ConfigError,
    DataError,
    LanguageModelingTask,
    PlanError,
    PruningConfig,
    SearchResult,
    SweepError,
    UnknownNameError,
    auto_prune,
)
from hf_prune.search import run as run_module
from hf_prune.search.goals import GOALS
from hf_prune.search.point import Loss, SearchPoint
from hf_prune.search.result import best_of
from hf_prune.search.run import _ladder
from tests import models
from tests.evaluation.test_generation import lines
from tests.models import assert_unchanged, snapshot
from tests.support.command_line import exit_code

QUICK = {"presets": ("fast", "balanced"), "held_out": 24}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Labelled sentences that the classifier answers rightly, in two splits."""
    folder = tmp_path_factory.mktemp("data")
    classifier = models.tiny_classifier(seed=4)
    for split, n, seed in (("train", 60, 1), ("dev", 48, 0)):
        rows = models.answered_sentences(n, seed, classifier)
        lines = [f"{text}\t{label}" for text, label in zip(rows["sentence"], rows["label"], strict=True)]
        (folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return str(folder)


def search(data, out, **options):
    task = ClassificationTask(data, calibration_samples=8)
    return auto_prune(models.tiny_classifier(seed=4), models.tiny_tokenizer(), task, out, **{**QUICK, **options})


def fake_losses(monkeypatch, loss_of):
    """Losses by the name of the candidate, in place of what the model loses."""
    measure = run_module.measure_candidate

    def measured(*args, name, **kwargs):
        point, model, report = measure(*args, name=name, **kwargs)
        loss = loss_of(name)
        return replace(point, loss=Loss(loss, 0.1, loss + 0.2)), model, report

    monkeypatch.setattr(run_module, "measure_candidate", measured)


def test_each_preset_begins_where_the_one_before_it_failed(data, tmp_path, monkeypatch):
    losses = {"fast, 50% zeros": 0.1, "fast, 60% zeros": 5.0, "balanced, 60% zeros": 0.5, "balanced, 70% zeros": 3.0}
    fake_losses(monkeypatch, losses.__getitem__)
    model = models.tiny_classifier(seed=4)
    before = snapshot(model)
    task = ClassificationTask(data, calibration_samples=8)
    result = auto_prune(
        model, models.tiny_tokenizer(), task, tmp_path / "out", goal="sparser", split="validation", **QUICK
    )
    assert_unchanged(model, before)
    assert [point.name for point in result.points] == list(losses)
    assert result.best.name == "balanced, 60% zeros"
    assert "'balanced, 60% zeros' is the sparsest within 1 points of accuracy" in result.why()
    assert "What goes further loses too much: 'balanced, 70% zeros'" in result.why()
    assert [point.name for point in result.pareto] == list(losses)[::2] + list(losses)[3:]
    assert result.reported.startswith("validation: accuracy")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json",
        "results.csv",
        "tradeoff.png",
        "model",
    }


def test_the_winner_is_saved_with_a_card_and_plain_transformers_loads_it(data, tmp_path, monkeypatch):
    fake_losses(monkeypatch, lambda name: 0.1 if "50%" in name else 9.0)
    result = search(data, tmp_path / "out", goal="sparser", split="validation", name="tiny")
    folder = Path(result.folder)
    card = (folder / "README.md").read_text()
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    zeros = sum(int((p == 0).sum()) for p in loaded.parameters())
    report = json.loads((folder / "sparsity_report.json").read_text())
    assert report["removed"] == pytest.approx(report["target_parameters"] / 2, rel=0.01)
    assert zeros == report["parameters"] - report["nonzero"] >= report["removed"]
    task = ClassificationTask(data)
    scores = [
        task.score(model, models.tiny_tokenizer(), "dev") for model in (models.tiny_classifier(seed=4), loaded.eval())
    ]
    drop = 100 * (scores[0].accuracy - scores[1].accuracy)
    assert drop > 0
    assert f"On the same examples the drop is {drop:.2f} points" in card
    assert card.split("---\n")[2].splitlines().count("# tiny-sparser") == 1
    assert 'model="tiny-sparser"' in card
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    assert values["best"] == result.best.name == "fast, 50% zeros"
    assert values["why"] == result.why()


def test_smaller_is_a_compressed_file_of_the_size_in_the_table(data, tmp_path, monkeypatch):
    fake_losses(monkeypatch, lambda name: 0.1 if "fast" in name else 9.0)
    result = search(data, tmp_path / "out", goal="smaller", presets=("fast",))
    assert result.best is min(result.points, key=lambda point: point.size)
    size = sum(path.stat().st_size for path in Path(result.folder).glob("model*.safetensors"))
    assert size == result.best.size < result.dense_size
    assert not result.best.plain


def test_faster_removes_heads_and_neurons_and_says_how_fast(data, tmp_path, monkeypatch):
    sizes = replace(GOALS["faster"], setting="target_params", levels=(0.9,))  # times of so small a model are noise
    monkeypatch.setitem(GOALS, "faster", sizes)
    fake_losses(monkeypatch, lambda name: 0.1)
    workload = {"batch_size": 1, "length": 16}
    result = search(data, tmp_path / "out", goal="faster", presets=("fast",), workload=workload, uniform=True)
    assert {point.config.granularity for point in result.points} <= {("head", "neuron"), ("neuron",)}
    assert result.best is not None
    assert 0 < result.best.sparsity < 1
    latency = json.loads((Path(result.folder) / "pruning_card.json").read_text())["latency"]
    assert [point["model"] for point in latency["points"]] == ["dense", "pruned"]


def test_an_interrupted_search_continues_without_measuring_again(data, tmp_path, monkeypatch):
    fake_losses(monkeypatch, lambda name: 0.1 if "50%" in name or "60%" in name else 9.0)
    measure, calls = run_module.measure_candidate, []

    def interrupted(*args, name, **kwargs):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(name)
        return measure(*args, name=name, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "measure_candidate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search(data, tmp_path / "out", goal="sparser")
    assert calls == ["fast, 50% zeros"]
    assert (tmp_path / "out" / "model" / "config.json").is_file()  # the best so far
    again = []

    def counted(*args, name, **kwargs):
        again.append(name)
        return measure(*args, name=name, **kwargs)

    monkeypatch.setattr(run_module, "measure_candidate", counted)
    result = search(data, tmp_path / "out", goal="sparser")
    assert "fast, 50% zeros" not in again
    assert [point.name for point in result.points][:2] == ["fast, 50% zeros", "fast, 60% zeros"]
    again.clear()
    assert search(data, tmp_path / "out", goal="sparser").to_dict()["points"] == result.to_dict()["points"]
    assert again == []
    with pytest.raises(SweepError, match="goal was 'sparser', now 'smaller'"):
        search(data, tmp_path / "out", goal="smaller")
    (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(SweepError, match="is not the result of a search"):
        search(data, tmp_path / "out", goal="sparser")


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("content", ["{}", "[1]", '{"format_version": 1, "points": []}'])
def test_what_no_search_wrote_is_replaced_only_if_that_is_asked_for(data, tmp_path, monkeypatch, content, restart):
    fake_losses(monkeypatch, lambda name: 9.0)
    (tmp_path / "results.json").write_text(content)
    (tmp_path / "results.csv").write_text("mine")
    options = {"goal": "sparser", "presets": ("fast",), "restart": restart}
    with pytest.raises(SweepError, match="is not the result of a search"):
        search(data, tmp_path, **options)
    assert (tmp_path / "results.json").read_text() == content
    assert (tmp_path / "results.csv").read_text() == "mine"
    assert len(search(data, tmp_path, overwrite=True, **options).points) == 1


@pytest.mark.parametrize("restart", [False, True])
def test_a_model_that_no_search_wrote_is_in_the_way(data, tmp_path, monkeypatch, restart):
    fake_losses(monkeypatch, lambda name: 9.0)
    options = {"goal": "sparser", "presets": ("fast",), "restart": restart}
    search(data, tmp_path, **options)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("mine")
    with pytest.raises(CheckpointError, match=r"config\.json, which hf-prune auto did not write"):
        search(data, tmp_path, max_drop=50, **options)
    assert (tmp_path / "model" / "config.json").read_text() == "mine"
    assert search(data, tmp_path, max_drop=50, overwrite=True, **options).saved is not None


def test_later_winners_replace_earlier_ones_without_a_word(data, tmp_path, monkeypatch, caplog):
    fake_losses(monkeypatch, lambda name: 0.1)
    options = {"goal": "sparser", "presets": ("fast",)}
    search(data, tmp_path / "out", **options)
    assert "Replaced in" not in caplog.text
    search(data, tmp_path / "out", restart=True, **options)
    assert caplog.text.count("Replaced in") == 1


def test_a_seed_reaches_the_candidates_and_another_one_continues_nothing(data, tmp_path, monkeypatch):
    fake_losses(monkeypatch, lambda name: 9.0)
    options = {"goal": "sparser", "presets": ("fast",)}
    result = search(data, tmp_path / "out", seed=3, **options)
    assert [point.config.seed for point in result.points] == [3]
    with pytest.raises(SweepError, match="seed was 3, now 0"):
        search(data, tmp_path / "out", **options)


def test_times_with_other_threads_are_not_continued(data, tmp_path, monkeypatch):
    fewer = replace(GOALS["faster"], setting="target_params", levels=(0.9,))
    monkeypatch.setitem(GOALS, "faster", fewer)
    fake_losses(monkeypatch, lambda name: 9.0)
    options = {"goal": "faster", "presets": ("fast",), "workload": {"batch_size": 1, "length": 16}}
    threads = torch.get_num_threads()
    search(data, tmp_path / "out", **options)
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(SweepError, match=f"threads was {threads}, now {threads + 1}"):
            search(data, tmp_path / "out", **options)
    finally:
        torch.set_num_threads(threads)


def test_settings_that_presets_share_are_tried_once():
    points = {}
    for name, _, _ in _ladder(GOALS["faster"], ("fast", "balanced", "best"), {}, False, points, 1.0):
        points[name] = point(name, 2.0, 9.0)
    assert list(points) == ["fast, 1.25x", "balanced, 1.25x"]  # "best" is the settings of "balanced"
    points = {}
    for name, _, _ in _ladder(GOALS["sparser"], ("fast", "balanced", "best"), {}, False, points, 1.0):
        points[name] = point(name, 2.0, 9.0)
    assert [name.split(",")[0] for name in points] == ["fast", "balanced", "best"]


def test_candidates_that_are_not_possible_are_kept_with_the_reason(data, tmp_path, monkeypatch):
    def impossible(*args, **kwargs):
        raise PlanError("out of reach")

    monkeypatch.setattr(run_module, "measure_candidate", impossible)
    with pytest.warns(UserWarning, match="is not possible: out of reach"):
        result = search(data, tmp_path / "out", goal="sparser")
    assert result.impossible == {"fast, 50% zeros": "out of reach", "balanced, 50% zeros": "out of reach"}
    assert result.why() == "No candidate could be measured."
    assert "'fast, 50% zeros' is not possible: out of reach" in str(result)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["impossible"] == result.impossible


def test_a_split_that_is_not_there_is_noticed_before_the_first_candidate(data, tmp_path):
    with pytest.raises(DataError, match="no split 'test' in"):
        search(data, tmp_path / "out", goal="sparser", split="test")
    assert not (tmp_path / "out").exists()


def test_without_a_split_the_card_has_the_held_out_score_and_says_so(data, tmp_path, monkeypatch):
    fake_losses(monkeypatch, lambda name: 0.1 if name == "balanced, 50% zeros" else 9.0)
    result = search(data, tmp_path / "out", goal="sparser", presets=("balanced",))
    card = (Path(result.folder) / "README.md").read_text()
    name = Path(data).name
    assert f"Measured on {name} (held out from calibration, but this model was chosen on it), train;" in card
    assert f"{100 * result.best.score:.2f}" in card
    assert f"Calibrated on up to 8 samples of {name}, train." in card
    assert result.reported == ""


@pytest.mark.parametrize("lost", [False, True])
def test_another_accepted_loss_saves_another_winner_from_the_same_measurements(data, tmp_path, monkeypatch, lost):
    losses = {"fast, 50% zeros": 0.1, "fast, 60% zeros": 2.0, "fast, 70% zeros": 9.0}
    fake_losses(monkeypatch, losses.__getitem__)
    out, options = tmp_path / "out", {"goal": "sparser", "presets": ("fast",)}
    assert search(data, out, max_drop=1, **options).best.name == "fast, 50% zeros"
    result = search(data, out, max_drop=5, **options)
    assert result.best.name == result.saved == "fast, 60% zeros"
    if lost:
        shutil.rmtree(out / "model")
    again = search(data, out, max_drop=1, **options)
    assert again.best.name == again.saved == "fast, 50% zeros"
    loaded = AutoPrunedModelForSequenceClassification.from_pretrained(again.folder)
    assert loaded.sparsity_report().target_sparsity == pytest.approx(0.5, abs=0.01)


def test_the_time_limit_stops_it_and_keeps_what_was_measured(data, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(run_module, "monotonic", lambda: float(next(clock)))
    fake_losses(monkeypatch, lambda name: 0.1)
    result = search(data, tmp_path / "out", goal="sparser", time_limit=250)
    assert len(result.points) == 2
    assert "Stopped early: the time limit of 4 min 10 s, before 'fast, 70% zeros'" in str(result)


def test_nothing_within_the_drop_is_said(data, tmp_path, monkeypatch):
    fake_losses(monkeypatch, lambda name: 7.0)
    result = search(data, tmp_path / "out", goal="sparser")
    assert result.best is None
    assert "Nothing is within 1 points of accuracy" in str(result)
    assert not (tmp_path / "out" / "model").exists()
    assert len(result.points) == 2  # one for each preset


def test_language_models_lose_perplexity(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(lines(80)))
    task = LanguageModelingTask(str(tmp_path / "train.txt"), calibration_samples=4, window=16)
    options = {"goal": "sparser", "max_drop": 500.0, "held_out": 8, "presets": ("fast",)}
    result = auto_prune(models.tiny_gpt2(), models.tiny_tokenizer(), task, tmp_path / "out", **options)
    assert result.unit == "per cent of perplexity"
    assert result.best is not None
    assert result.dense_score > 1
    card = (Path(result.folder) / "README.md").read_text()
    assert "Measured on train.txt (held out from calibration, but this model was chosen on it)" in card
    assert "## What it writes" in card
    _check_held_out_again(result.folder, tmp_path / "train.txt")


def _check_held_out_again(folder, data):
    """Verify measures the score of the card again on what the search held out."""
    assert exit_code("verify", folder, "--evaluate", "--data", data) == 0


def test_the_held_out_score_of_a_classifier_is_measured_again(data, tmp_path, capsys):
    task = ClassificationTask(str(data), calibration_samples=8)
    model, options = models.tiny_classifier(seed=4), {"goal": "sparser", "max_drop": 100.0, "held_out": 24}
    for name, each in (("dense", model), ("other", models.tiny_classifier(seed=5))):
        each.save_pretrained(tmp_path / name)
        models.tiny_tokenizer().save_pretrained(tmp_path / name)
    result = auto_prune(model, models.tiny_tokenizer(), task, tmp_path / "out", presets=("fast",), **options)
    _check_held_out_again(result.folder, data)
    assert "accuracy" in capsys.readouterr().out
    again = ("verify", result.folder, "--evaluate", "--data", data)
    assert exit_code(*again, "--against", tmp_path / "dense") == 0
    assert exit_code(*again, "--against", tmp_path / "other") == 1
    assert "of the divergence" in capsys.readouterr().out
    assert exit_code(*again, "--split", "train") == 1
    assert "is of data that was held out, as it is again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"goal": "fastest"}, UnknownNameError, "unknown goal 'fastest'"),
        ({"presets": ("bst",)}, UnknownNameError, "unknown preset 'bst'"),
        ({"presets": ()}, ConfigError, "presets is empty"),
        ({"max_drop": 0}, ConfigError, "max_drop is 0: expected a number above 0"),
        ({"max_drop": True}, ConfigError, "max_drop is True: expected a number above 0"),
        ({"max_drop": "1"}, ConfigError, "max_drop is '1': expected a number above 0"),
        ({"max_drop": -1.0}, ConfigError, "max_drop is -1.0: expected a number above 0"),
        ({"max_drop": float("nan")}, ConfigError, "max_drop is nan: expected a number above 0"),
        ({"max_drop": float("inf")}, ConfigError, "max_drop is inf: expected a number above 0"),
        ({"time_limit": 0}, ConfigError, "time_limit is 0: expected seconds"),
        ({"goal": "sparser", "uniform": True}, ConfigError, "uniform=True is for the goal 'faster'"),
        ({"goal": "smaller", "workload": {"length": 8}}, ConfigError, "workload=.* is for the goal 'faster'"),
        ({"split": "train"}, ConfigError, "the split 'train' is searched and reported on"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(data, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        search(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_dense_model_that_does_not_do_the_task_is_refused(data, tmp_path):
    model = models.tiny_classifier(seed=4)
    with torch.no_grad():
        model.classifier.weight.neg_()
        model.classifier.bias.neg_()
    task = ClassificationTask(data, calibration_samples=8)
    with pytest.raises(BudgetError, match="nothing can be chosen by what it loses, since"):
        auto_prune(model, models.tiny_tokenizer(), task, tmp_path / "out", goal="sparser", **QUICK)


def point(name, speed, loss, plain=False):
    return SearchPoint(name, "best", PruningConfig(0.5), plain, Loss(loss, 0.1, loss + 0.2), 0.9, 100, speed, 0.5, 1.0)


def test_what_plain_transformers_loads_wins_where_it_costs_little():
    goal = GOALS["faster"]
    own, alike = point("own", 2.0, 0.3), point("alike", 1.95, 0.5, plain=True)
    assert best_of((own, alike), goal, 1.0) is alike
    assert best_of((own, replace(alike, speedup=1.8)), goal, 1.0) is own  # slower by more than a twentieth
    assert best_of((own, replace(alike, loss=Loss(0.7, 0.1, 0.9))), goal, 1.0) is own  # 0.3 more is too much
    assert best_of((own, alike), goal, 0.1) is None


def test_a_damaged_point_is_refused():
    values = point("own", 2.0, 0.3).to_dict()
    assert SearchPoint.from_dict(json.loads(json.dumps(values))) == point("own", 2.0, 0.3)
    for damage in ({"size": "x"}, {"loss": {}}, {"more": 1}):
        with pytest.raises(DataError, match="a point of the search is damaged"):
            SearchPoint.from_dict({**values, **damage})


def test_a_result_prints_a_table():
    result = SearchResult(
        "faster", 1.0, "points of accuracy", "n", {"model": "m"}, 0.9, 100, (point("a", 2.0, 0.3), point("b", 3.0, 4.0))
    )
    text = str(result)
    assert "chosen" in text
    assert "too much" in text
    assert "'a' is the fastest within 1 points of accuracy: lost 0.30 ± 0.10, at most 0.50." in text
