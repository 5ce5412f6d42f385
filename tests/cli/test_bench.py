"""hf-prune bench, from end to end on tiny checkpoints, with rounds that the tests make up where numbers count."""

import json
import re

import pytest

from hf_prune import prune, shrink
from hf_prune.cli.main import main
from hf_prune.cli.workflows.bench import measure_accelerations, zero_notes
from hf_prune.errors import ConfigError
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.inference.timing import Ratio, Timings
from tests import models
from tests.architecture_models import tiny

PNG = b"\x89PNG"
FEW = ("--length", "8", "--rounds", "6", "--warmup", "1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    made = {"dense": models.tiny_classifier(4), "other": models.tiny_classifier(5), "gpt2": models.tiny_gpt2()}
    made |= {"sparse": prune(models.tiny_classifier(4), 0.5), "vit": models.tiny_vit()}
    for name, model in made.items():
        model.save_pretrained(root / name)
        if name != "vit":
            models.tiny_tokenizer().save_pretrained(root / name)
    models.tiny_classifier(4).save_pretrained(root / "bare")
    (root / "data").mkdir()
    rows = models.tiny_sentences()
    lines = [f"{text}\t{label}" for text, label in zip(rows["sentence"], rows["label"], strict=True)]
    (root / "data" / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return {folder.name: str(folder) for folder in root.iterdir()}


@pytest.fixture
def bench(capsys):
    def run(*arguments, code=0):
        with pytest.raises(SystemExit) as ended:
            main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert ended.value.code == code, err
        return err if code else out

    return run


@pytest.fixture
def seconds(monkeypatch):
    """Made-up rounds: the seconds of each model in turn."""

    def use(*times):
        def timed(runs, *, rounds, **_):
            return {
                name: Timings(tuple(t[i % len(t)] for i in range(rounds)), (1.0,) * rounds)
                for name, t in zip(runs, times, strict=True)
            }

        monkeypatch.setattr("hf_prune.inference.latency.time_together", timed)

    return use


def test_what_is_real_and_what_is_noise(bench, folders, seconds):
    seconds([0.02, 0.03], [0.01, 0.015], [0.03, 0.02])
    out = bench(folders["dense"], folders["other"], folders["sparse"], "--length", 8, "--rounds", 20, "--threads", 1)
    rows = {line.split()[0]: line for line in out.splitlines() if "  forward  " in line}
    assert rows["dense"].endswith(" -")
    assert rows["other"].endswith(" 2.00x (2.00 to 2.00)")
    assert rows["sparse"].endswith(" within the noise")
    assert "20 rounds in turns, float32, cpu, 1 thread(s), torch " in out
    assert "sparse and dense are not told apart at forward, 1 x 8 tokens (" in out
    assert "other and dense" not in out
    assert "More rounds, or a quieter machine, may tell." in out
    (note,) = [line for line in out.splitlines() if "zeros alone bring no speed" in line]
    assert re.match(r"In sparse, 50\.0 % of the weights that can be pruned are zero, and it is no smaller", note)
    assert note.endswith("; hf-prune accelerate measures what sparse ones bring on a CPU.")


def test_zeros_in_a_smaller_model_get_no_note():
    dense = tiny("bert")[0]
    smaller = prune(shrink(prune(tiny("bert")[0], 0.5, granularity=("head", "neuron"))), 0.5)
    assert zero_notes({"dense": dense, "smaller": smaller}) == []
    assert len(zero_notes({"smaller": smaller})) == 1
    assert zero_notes({"exported": object()}) == []


def test_few_zeros_are_not_sent_to_sparse_kernels():
    (note,) = zero_notes({"sparse": prune(models.tiny_classifier(4), 0.4)})
    assert note.endswith("zeros alone bring no speed on dense kernels.")
    (note,) = zero_notes({"sparse": prune(models.tiny_classifier(4), 0.9)}, measured=True)
    assert note.endswith("zeros alone bring no speed on dense kernels.")


def test_what_the_fastest_kernels_bring_each(bench, folders, monkeypatch):
    asked = []

    def measure(model, workload, progress):
        asked.append(workload)
        ratio = Ratio(2.0, 1.9, 2.1) if len(asked) % 2 == 0 else None
        return AccelerationReport((), ratio, 2.0, 1.0, 1e-7, 9, 5, 2, 8, 1, {"cpu": "a CPU"})

    monkeypatch.setattr("hf_prune.cli.workflows.bench.measure_acceleration", measure)
    options = ("--accelerate", "--batch", "2,1", "--threads", 1, *FEW)
    out = bench(folders["dense"], folders["sparse"], *options)
    assert asked == [{"batch_size": 2, "length": 8, "threads": 1}] * 2
    assert "dense, 2 x 8 tokens: accelerate() finds no kernels that make the model faster on a CPU." in out
    assert "sparse, 2 x 8 tokens: accelerate() makes the model 2.00 times as fast (95 % interval 1.90 to 2.10)" in out
    assert "hf-prune accelerate measures" not in out
    values = json.loads(bench(folders["dense"], folders["sparse"], *options, "--json"))
    assert [report["speedup"] for report in values["accelerations"].values()] == [
        None, {"value": 2.0, "low": 1.9, "high": 2.1},
    ]  # fmt: skip
    assert json.loads(bench(folders["dense"], *FEW, "--json"))["accelerations"] == {}


def test_acceleration_is_measured_on_the_plain_models(bench, folders):
    """Nothing is faked here: the kernels are taken off again before the timing in turns."""
    out = bench(folders["dense"], folders["sparse"], "--accelerate", "--threads", 1, *FEW)
    assert len(re.findall(r"(?m)^(dense|sparse), 1 x 8 tokens: accelerate\(\) ", out)) == 2


def test_exported_files_alone_have_no_layers_to_choose_for():
    with pytest.raises(ConfigError, match=r"--accelerate is for checkpoints: found exported files alone, model.onnx"):
        measure_accelerations({"model.onnx": object()}, {})


def test_accuracies_and_picture(bench, folders, tmp_path):
    picture, options = tmp_path / "speed.png", ("--data", folders["data"], *FEW)
    out = bench(folders["dense"], folders["other"], *options, "--plot", picture)
    assert picture.read_bytes().startswith(PNG)
    assert f"Drawn: {picture}" in out
    values = json.loads(bench(folders["dense"], folders["other"], *options, "--json"))
    assert values["accuracies"].keys() == {"dense", "other"}
    printed = f"other: {100 * values['accuracies']['other']:.2f} % right on validation"
    assert printed in out


def test_accuracies_are_those_of_evaluate(bench, folders, capsys):
    values = json.loads(bench(folders["dense"], folders["other"], "--data", folders["data"], *FEW, "--json"))
    for name in ("dense", "other"):
        with pytest.raises(SystemExit):
            main(["evaluate", folders[name], "--data", folders["data"], "--json"])
        assert values["accuracies"][name] == json.loads(capsys.readouterr().out)["evaluation"]["accuracy"]
    assert values["accuracies"]["dense"] != values["accuracies"]["other"]


def test_language_models_are_scored_by_perplexity(bench, folders, tmp_path, capsys):
    (tmp_path / "test.txt").write_text("\n".join(models.tiny_sentences(30)["sentence"]))
    options, picture = ("--data", tmp_path, *FEW), tmp_path / "speed.png"
    values = json.loads(bench(folders["gpt2"], folders["gpt2"], *options, "--json"))
    with pytest.raises(SystemExit):
        main(["evaluate", folders["gpt2"], "--data", str(tmp_path), "--prompts", "0", "--json"])
    expected = json.loads(capsys.readouterr().out)["evaluation"]["perplexity"]
    assert list(values["perplexities"].values()) == [expected, expected]
    out = bench(folders["gpt2"], *options, "--plot", picture)
    assert f"gpt2: perplexity {expected:.2f} on test of {tmp_path}" in out
    assert picture.read_bytes().startswith(PNG)
    error = bench(folders["gpt2"], folders["dense"], *options, "--json", code=1)
    assert "expected a …ForCausalLM like the first; leave out --data to time it" in error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_json_has_every_setting(bench, folders, dtype):
    options = ("--batch", "1,2", "--length", "4,8", "--rounds", 2, "--warmup", 1, "--dtype", dtype, "--json")
    values = json.loads(bench(folders["dense"], folders["sparse"], *options), parse_constant=pytest.fail)
    assert [(p["model"], p["batch_size"], p["length"]) for p in values["points"]] == [
        (name, size, length) for size in (1, 2) for length in (4, 8) for name in ("dense", "sparse")
    ]
    assert (values["rounds"], values["dtype"], values["device"]) == (2, dtype, "cpu")
    assert values["threads"] >= 1
    assert values["torch"]
    assert len(values["notes"]) == 1


def test_generation_beside_prefill(bench, folders):
    out = bench(folders["gpt2"], "--new-tokens", 3, *FEW)
    assert [line.split()[1] for line in out.splitlines() if " 1 x 8 " in line] == ["forward", "generate"]


def test_images(bench, folders, tmp_path):
    out = bench(folders["vit"], "--rounds", 6, "--warmup", 1, "--plot", tmp_path / "vit.png")
    (row,) = [line for line in out.splitlines() if line.startswith("vit")]
    assert row.split()[2] == "1"
    assert row.endswith("-         -")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("dense", ["--length", "25"], "dense: a workload of length 25 is longer than the 24 positions"),
        ("dense", ["--length", "8", "--new-tokens", "2"], "for causal language models, which dense is not"),
        ("gpt2", ["--length", "20", "--new-tokens", "5"], "are more than the 24 positions of gpt2"),
        ("dense", ["--plot", "speed.txt"], "--plot is 'speed.txt': expected a file that ends in .png, .svg, .pdf"),
        ("vit", ["--json", "--data", "DATA"], "is a ViTForImageClassification, which learns from images"),
        ("bare", ["--json", "--data", "DATA"], "has no tokenizer, which scoring needs"),
    ],
)
def test_refusals_come_before_any_timing(bench, folders, monkeypatch, model, options, message):
    monkeypatch.setattr("hf_prune.inference.latency.time_together", lambda *_, **__: pytest.fail("something was timed"))
    options = [folders["data"] if option == "DATA" else option for option in options]
    assert message in bench(folders[model], *options, code=1)
