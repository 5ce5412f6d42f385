"""Latency of models beside one another: what is said of timings, with timings that the tests make up."""

import json

import pytest
import torch

from hf_prune import ConfigError, explain_speed, measure_latency, prune, shrink
from hf_prune.cli.main import main
from hf_prune.cli.workflows.bench import short_names
from hf_prune.evaluation.plots import plot_latency
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.inference.latency_result import LatencyPoint, LatencyResult
from hf_prune.inference.timing import Ratio, Timings
from hf_prune.utils.figures import save_figure
from tests.architecture_models import tiny
from tests.models import tiny_bert, tiny_llama, tiny_sentences, tiny_tokenizer
from tests.support.command_line import exit_code


def fake(seconds):
    """Rounds of made-up seconds, by the order of the models."""

    def timed(runs, *, rounds, **_):
        found = {}
        for run, times in zip(runs, seconds, strict=True):
            wall = tuple(times[i % len(times)] for i in range(rounds))
            found[run] = Timings(wall, tuple(2 * t for t in wall))
        return found

    return timed


@pytest.fixture
def models():
    return {"dense": tiny_bert(0), "pruned": tiny_bert(1)}


def test_a_real_difference_is_told(models, monkeypatch):
    monkeypatch.setattr("hf_prune.inference.latency.time_together", fake([[0.02, 0.04], [0.01, 0.02]]))
    result = measure_latency(models, batch_sizes=[2], lengths=[8], rounds=20)
    dense, pruned = result.points
    assert (dense.median, dense.against, dense.verdict) == (pytest.approx(0.03), None, "-")
    assert pruned.against.value == pytest.approx(2.0)
    assert pruned.verdict == "2.00x (2.00 to 2.00)"
    assert pruned.tokens_per_second == pytest.approx(16 / 0.015)
    assert pruned.cpu == pytest.approx(0.03)
    text = str(result)
    assert "20 rounds in turns, float32, cpu" in text
    assert "not told apart" not in text


def test_noise_is_called_noise(models, monkeypatch):
    monkeypatch.setattr("hf_prune.inference.latency.time_together", fake([[0.02, 0.03], [0.03, 0.02]]))
    result = measure_latency(models, batch_sizes=[1], lengths=[8], rounds=20)
    assert result.points[1].verdict == "within the noise"
    assert "pruned and dense are not told apart at forward, 1 x 8 tokens" in str(result)
    values = json.loads(json.dumps(result.to_dict()))
    assert values["points"][1]["against"]["is_real"] is False
    assert values["points"][0]["against"] is None


def test_quartiles_and_percentiles(models, monkeypatch):
    times = [i / 100 for i in range(1, 101)]
    monkeypatch.setattr("hf_prune.inference.latency.time_together", fake([times, times]))
    point = measure_latency(models, lengths=[8], rounds=100).points[0]
    assert (point.low, point.high, point.p95) == tuple(pytest.approx(x) for x in (0.2575, 0.7525, 0.9505))


def test_real_runs_leave_everything_as_it_was(models):
    threads = torch.get_num_threads()
    models["dense"].train()
    result = measure_latency(models, batch_sizes=[1, 2], lengths=[4, 8], rounds=2, warmup=1, threads=threads + 1)
    assert len(result.points) == 8
    assert result.threads == threads + 1
    assert torch.get_num_threads() == threads
    assert models["dense"].training
    assert not models["pruned"].training
    assert all(point.median > 0 for point in result.points)


def test_generation_is_timed_as_well():
    model = tiny_llama(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    result = measure_latency({"a": model}, lengths=[4], rounds=2, warmup=1, new_tokens=3)
    assert [point.task for point in result.points] == ["forward", "generate"]
    assert result.points[1].tokens_per_second == pytest.approx(3 / result.points[1].median)


@pytest.mark.parametrize("model_type", ["vit", "whisper"])
def test_images_and_sound(model_type):
    model, _ = tiny(model_type)
    assert measure_latency({"a": model}, rounds=2, warmup=1).points[0].median > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_sizes": []}, "batch_sizes is"),
        ({"lengths": [0]}, r"lengths is \[0\]"),
        ({"rounds": 0}, r"rounds is \[0\]"),
        ({"threads": 0}, "threads is 0"),
        ({"new_tokens": 4}, "for causal language models"),
    ],
)
def test_settings_that_make_no_sense(models, settings, message):
    with pytest.raises(ConfigError, match=message):
        measure_latency(models, **{"lengths": [8], **settings})


def test_models_that_are_not_alike_are_not_compared(models):
    models["pruned"].to(torch.bfloat16)
    with pytest.raises(ConfigError, match="different dtypes, devices or inputs cannot be compared"):
        measure_latency(models)
    with pytest.raises(ConfigError, match="there is no model to time"):
        measure_latency({})


def test_short_names():
    assert short_names(["/a/model", "b/model/"]) == ["a/model", "b/model"]
    assert short_names(["x", "x", "x"]) == ["x", "x (2)", "x (3)"]


def test_the_picture(models, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_prune.inference.latency.time_together", fake([[0.02, 0.021], [0.01, 0.011]]))
    result = measure_latency(models, batch_sizes=[1, 2], lengths=[8], rounds=20)
    figure = plot_latency(result, {"dense": 0.9, "pruned": 0.85}, "title")
    assert [axes.get_title() for axes in figure.axes] == ["forward, 1 x 8 tokens", "forward, 2 x 8 tokens"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["times as fast as dense"] * 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dense", "pruned"]
    assert "hollow" not in figure.get_suptitle()
    alone = plot_latency(result, {}, "title")
    assert [label.get_text() for label in alone.axes[0].get_yticklabels()] == ["dense", "pruned"]
    for i, each in enumerate((figure, alone)):
        assert save_figure(each, tmp_path / f"{i}.png").stat().st_size > 5_000


def test_the_picture_shows_what_is_noise(models, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_prune.inference.latency.time_together", fake([[0.02, 0.03], [0.03, 0.02]]))
    for rounds in (20, 3):  # of three rounds there is no interval to draw
        result = measure_latency(models, lengths=[8], rounds=rounds)
        for accuracies in ({"dense": 0.9, "pruned": 0.85}, {}):
            figure = plot_latency(result, accuracies, "title")
            faces = [bar.lines[0].get_markerfacecolor() for bar in figure.axes[0].containers]
            assert faces[0] != "white"
            assert faces[1] == "white"
            assert figure.axes[0].containers[1].has_xerr == (rounds == 20 or not accuracies)
            assert "hollow: within the noise" in figure.get_suptitle()
            assert save_figure(figure, tmp_path / "noise.png").stat().st_size > 5_000


def test_every_model_has_a_mark_of_its_own():
    times = {"median": 0.1, "low": 0.1, "high": 0.1, "p95": 0.1, "cpu": 0.1, "tokens_per_second": 1.0, "against": None}
    points = [LatencyPoint(f"m{i}", size, 8, "forward", **times) for size in (1, 2, 3, 4) for i in range(14)]
    figure = plot_latency(LatencyResult(tuple(points), 6, 1, "float32", "cpu", "2"), {}, "title")
    marks = [(bar.lines[0].get_color(), bar.lines[0].get_marker()) for bar in figure.axes[0].containers]
    assert len(set(marks)) == 14
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == (2, 2)


# --- explain ------------------------------------------------------------------------------------------


def test_zeros_alone_are_said_to_bring_nothing():
    model = prune(tiny_bert(), 0.5)
    text = explain_speed(model)
    assert "Shapes: those of the dense model" in text
    assert "Zeros: 50.0 %" in text
    assert "they bring no speed" in text
    assert "Nothing was timed" in text
    measures = "pay off with sparse kernels on a CPU: hf-prune accelerate measures it"
    assert measures in text
    assert measures not in explain_speed(prune(tiny_bert(), 0.4))
    pattern = explain_speed(prune(tiny_bert(), granularity="2:4"))
    assert "sparse tensor cores" in pattern
    assert measures in pattern


def test_what_was_taken_out_is_said():
    model = shrink(prune(tiny("bert")[0], 0.5, granularity=("head", "neuron")))
    text = explain_speed(model)
    assert "in smaller matrices" in text
    assert "6 of 12 heads are left" in text
    assert "36 of 72 neurons are left" in text
    assert "Zeros: hardly any" in text


def test_an_unknown_architecture_is_explained_by_its_zeros():
    assert "is not known" in explain_speed(prune(torch.nn.Sequential(torch.nn.Linear(8, 8)), 0.5))


# --- the commands -------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path):
    folders = [tmp_path / "dense", tmp_path / "pruned"]
    for folder, model in zip(folders, (tiny_bert(), prune(tiny_bert(), 0.5)), strict=True):
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    data = tmp_path / "data"
    data.mkdir()
    rows = tiny_sentences()
    lines = ["sentence\tlabel", *(f"{s}\t{y}" for s, y in zip(rows["sentence"], rows["label"], strict=True))]
    (data / "dev.tsv").write_text("\n".join(lines) + "\n")
    return [str(folder) for folder in folders], str(data)


def run(*arguments):
    assert exit_code(*arguments) == 0


def test_bench_prints_draws_and_scores(checkpoints, tmp_path, capsys):
    folders, data = checkpoints
    picture = tmp_path / "speed.png"
    few = ["--length", "8", "--rounds", "6", "--warmup", "1"]
    run("bench", *folders, *few, "--batch", "1,2", "--data", data, "--plot", str(picture))
    out = capsys.readouterr().out
    assert "1 x 8" in out
    assert "2 x 8" in out
    assert "dense: " in out
    assert "% right on validation" in out
    assert picture.stat().st_size > 5_000
    run("bench", *folders, *few, "--json")
    values = json.loads(capsys.readouterr().out)
    assert [point["model"] for point in values["points"]] == ["dense", "pruned"]


def test_explain_times_against_the_dense_one(checkpoints, capsys):
    (dense, pruned), _ = checkpoints
    run("explain", pruned, "--against", dense, "--length", "8", "--rounds", "6", "--warmup", "1")
    out = capsys.readouterr().out
    assert "they bring no speed" in out
    assert "Measured:" in out
    run("explain", pruned)
    assert "Nothing was timed" in capsys.readouterr().out


def test_explain_says_what_faster_kernels_bring(checkpoints, capsys):
    (_, pruned), _ = checkpoints
    threads = torch.get_num_threads()
    run("explain", pruned, "--accelerate", "--length", "8", "--threads", "1")
    out = capsys.readouterr().out
    assert "accelerate() makes the model" in out or "accelerate() finds no kernels" in out
    assert "Nothing was timed" not in out
    assert torch.get_num_threads() == threads


def test_subnormal_activations_are_warned_of(models, monkeypatch):
    monkeypatch.setattr("hf_prune.inference.latency.time_together", fake([(1.0,), (1.0,)]))
    with torch.no_grad():
        models["pruned"].bert.embeddings.LayerNorm.weight.zero_()
        models["pruned"].bert.embeddings.LayerNorm.bias.fill_(1e-40)
    with pytest.warns(UserWarning, match=r"pruned: Inputs of bert\.encoder.* subnormal.*set_flush_denormal") as caught:
        measure_latency(models, lengths=[4], rounds=6)
    assert len(caught) == 1


def test_what_was_measured_is_a_sentence():
    ratio = Ratio(2.0, 1.9, 2.1)
    plain = {"kinds": (), "before": 2.0, "after": 1.0, "difference": 0.0, "bytes_before": 1, "bytes_after": 1}
    plain |= {"batch_size": 1, "length": 8}
    report = AccelerationReport(speedup=ratio, threads=1, machine={"cpu": "a CPU"}, **plain)
    assert report.sentence == (
        "accelerate() makes the model 2.00 times as fast (95 % interval 1.90 to 2.10) on a CPU, threads: 1."
    )
    text = explain_speed(prune(tiny_bert(), 0.8), acceleration=report)
    assert report.sentence in text
    assert "Nothing was timed" not in text
    nothing = AccelerationReport(speedup=None, threads=1, machine={"cpu": "a CPU"}, **plain)
    assert nothing.sentence == "accelerate() finds no kernels that make the model faster on a CPU."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "x"], "--batch is 'x': expected whole numbers"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--device", "nowhere"], "unknown device 'nowhere'"),
    ],
)
def test_options_that_make_no_sense(checkpoints, arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", checkpoints[0][0], *arguments])
    assert message in capsys.readouterr().err


def test_data_without_a_picture_is_refused(checkpoints, capsys):
    folders, data = checkpoints
    with pytest.raises(SystemExit):
        main(["bench", *folders, "--data", data])
    assert "add --plot FILE.png" in capsys.readouterr().err


def test_results_are_plain_values():
    empty = LatencyResult((), 1, 1, "float32", "cpu", "2")
    assert empty.to_dict()["format_version"] == 1
