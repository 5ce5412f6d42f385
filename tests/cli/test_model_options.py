"""Options of every command that loads a model, and the file that repeats a run."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import typer
import yaml
from transformers import AutoModelForSequenceClassification

from hf_prune import PruningConfig
from hf_prune.auto import load_native
from hf_prune.cli.main import app, main
from hf_prune.errors import ConfigError, DataError, UnknownNameError
from hf_prune.planning.presets import PRESETS
from hf_prune.utils.load_options import LoadOptions, load_options, loading_with, resolve_device
from tests import models

LOADING = ("prune", "evaluate", "sweep", "report", "accelerate", "explain", "trim-vocab", "train", "lottery", "bench")
SHARED = {"device", "dtype", "revision", "token", "trust_remote_code", "seed", "verbose", "quiet", "config"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("options") / "model"
    models.tiny_classifier(seed=4).save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path) -> str:
    (tmp_path / "data").mkdir()
    for split, seed in (("train", 1), ("dev", 0)):
        rows = models.answered_sentences(40, seed, models.tiny_classifier(seed=4))
        lines = [f"{text}\t{label}" for text, label in zip(rows["sentence"], rows["label"], strict=True)]
        (tmp_path / "data" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return str(tmp_path / "data")


@pytest.fixture
def hf_prune(capsys):
    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


@pytest.mark.parametrize("command", LOADING)
def test_every_command_that_loads_a_model_has_them(command):
    names = {option.name for option in typer.main.get_command(app).commands[command].params}
    assert names >= SHARED - ({"device"} if command == "accelerate" else set())


def test_a_dtype_is_that_of_what_is_saved(hf_prune, folder, tmp_path):
    assert hf_prune("prune", folder, "--dtype", "bfloat16", "--out", tmp_path / "out")[0] == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert load_options() == LoadOptions()  # nothing stays


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--dtype", "float8", "unknown dtype 'float8': expected one of auto, float32"),
        ("--device", "gpu", "unknown device 'gpu': expected one of auto, cpu"),
        ("--device", "cpu:x", "device 'cpu:x' cannot be used"),
    ],
)
def test_what_there_is_not(hf_prune, folder, tmp_path, option, value, message):
    code, out, err = hf_prune("prune", folder, option, value, "--out", tmp_path / "out")
    assert (code, out, err.startswith(f"error: {message}")) == (1, "", True), err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_auto_is_the_cpu_where_there_is_nothing_else():
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"device 'cuda' cannot be used: .*; choose auto"):
        resolve_device("cuda")


def test_auto_is_the_accelerator_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    assert resolve_device("auto") == torch.device("mps")
    monkeypatch.setenv("WORLD_SIZE", "2")  # several processes share the work on the CPU
    assert resolve_device("auto") == torch.device("cpu")


def test_a_token_is_where_libraries_look_for_it_and_nowhere_else(hf_prune, folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("HF_TOKEN", "hf_before")
    monkeypatch.setattr("hf_prune.cli.workflows.prune.copy_companions", lambda *_: seen.append(os.environ["HF_TOKEN"]))
    code, out, err = hf_prune("prune", folder, "--token", "hf_secret", "--out", tmp_path / "out")
    assert (code, seen, os.environ["HF_TOKEN"]) == (0, ["hf_secret"], "hf_before")
    assert "hf_secret" not in out + err + "".join(p.read_text("latin-1") for p in (tmp_path / "out").iterdir())
    assert "hf_before" not in hf_prune("prune", "--help")[1]


def test_a_revision_is_of_the_model_alone():
    with loading_with(LoadOptions(model="owner/name", revision="v2")):
        assert load_options().hub("owner/name") == {"revision": "v2"}
        assert load_options().hub("owner/other") == {}
    assert load_options().hub("owner/name") == {}


def test_quiet_and_verbose(hf_prune, folder, tmp_path):
    out = tmp_path / "out"
    assert hf_prune("prune", folder, "--out", out)[2].startswith("note: preset 'fast'")
    assert hf_prune("prune", folder, "-q", "--out", out)[2] == ""
    assert "Replaced in" in "".join(hf_prune("prune", folder, "--out", out)[1:])
    assert "Replaced in" not in "".join(hf_prune("prune", folder, "-q", "--out", out)[1:])
    code, _, err = hf_prune("prune", tmp_path / "nothing", "-v", "--out", out)
    assert (code, err.startswith("Traceback"), err.splitlines()[-1][:7]) == (1, True, "error: ")
    code, _, err = hf_prune("prune", folder, "-v", "-q", "--out", out)
    assert (code, err) == (1, "error: --verbose and --quiet contradict each other: leave one out\n")


# --- the file of a run -----------------------------------------------------------------------------


def test_every_run_writes_the_file_that_repeats_it(hf_prune, folder, data, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    options = [
        "--sparsity",
        0.6,
        "--criterion",
        "wanda",
        "--scope",
        "row",
        "--data",
        data,
        "--exclude-modules",
        "re:cl.*",
    ]
    assert hf_prune("prune", folder, *options, "--calibration-samples", 16, "--seed", 3, "--out", first)[0] == 0
    written = yaml.safe_load((first / "hf_prune_run.yaml").read_text())
    assert written["command"] == "prune"
    assert written["model"] == folder
    assert (written["sparsity"], written["criterion"], written["calibration_samples"]) == (0.6, "wanda", 16)
    assert written["exclude_modules"] == "cl.*"  # as a PruningConfig says it
    assert not {"token", "overwrite", "verbose", "as_json"} & written.keys()
    code, _, err = hf_prune("prune", "--config", first / "hf_prune_run.yaml", "--out", again)
    assert code == 0, err
    one, other = load_native(str(first)), load_native(str(again))
    assert other.pruning_config == one.pruning_config
    assert one.pruning_config.seed == 3
    models.assert_unchanged(other, models.snapshot(one))


def test_the_file_of_a_run_has_what_was_not_given(hf_prune, folder, data, tmp_path, monkeypatch):
    """So that it repeats the run whatever the defaults become."""
    first, again = tmp_path / "first", tmp_path / "again"
    few = ("--calibration-samples", 8)
    assert hf_prune("prune", folder, "--sparsity", 0.6, "--data", data, *few, "--out", first)[0] == 0
    written = yaml.safe_load((first / "hf_prune_run.yaml").read_text())
    expected = {"preset": "balanced", "criterion": "sparsegpt", "allocation": "fisher", "seed": 0, "repair": None}
    assert {name: written[name] for name in expected} == expected
    monkeypatch.setitem(PRESETS, "balanced", PRESETS["best+polish"])
    assert hf_prune("prune", "--config", first / "hf_prune_run.yaml", "--out", again)[0] == 0
    assert load_native(str(again)).pruning_config == load_native(str(first)).pruning_config
    assert hf_prune("prune", folder, "--target-params", 0.6, "--out", first)[0] == 0
    written = yaml.safe_load((first / "hf_prune_run.yaml").read_text())
    assert (written["granularity"], written["target_params"], "sparsity" in written) == (["head", "neuron"], 0.6, False)
    code, _, err = hf_prune("prune", "--config", first / "hf_prune_run.yaml", "--sparsity", 0.2, "--out", again)
    assert code == 0, err
    assert load_native(str(again)).config.pruned_structure


def test_a_training_is_repeated(hf_prune, folder, data, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    options = ("--data", data, "--epochs", 2, "--every", 1, "--end", 2, "--limit", 8)
    assert hf_prune("train", folder, *options, "--out", first)[0] == 0
    assert json.loads((first / "training_report.json").read_text())["pruned"]["n"] == 8
    written = yaml.safe_load((first / "hf_prune_run.yaml").read_text())
    moments = {"schedule": "cubic", "begin": "0.0", "end": "2", "every": "1"}
    expected = {"sparsity": 0.5, "criterion": "alps", "preset": "best", "seed": 0, **moments}
    assert {name: written[name] for name in expected} == expected
    code, _, err = hf_prune("train", "--config", first / "hf_prune_run.yaml", "--out", again)
    assert code == 0, err
    assert load_native(str(again)).pruning_config == load_native(str(first)).pruning_config


def test_numbers_may_be_written_as_texts(hf_prune, folder, tmp_path):
    (tmp_path / "run.yaml").write_text("sparsity: 1e-1\nseed: '3'\n")
    assert hf_prune("prune", folder, "--config", tmp_path / "run.yaml", "--out", tmp_path / "out")[0] == 0
    assert load_native(str(tmp_path / "out")).pruning_config == PruningConfig(0.1, seed=3)


def test_a_run_file_is_replaced_and_goes_no_further(hf_prune, folder, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert hf_prune("prune", folder, "--sparsity", 0.3, "--out", first)[0] == 0
    assert hf_prune("prune", "--config", first / "hf_prune_run.yaml", "--sparsity", 0.4)[0] == 0  # into the same folder
    assert yaml.safe_load((first / "hf_prune_run.yaml").read_text())["sparsity"] == 0.4
    assert hf_prune("prune", first, "--sparsity", 0.5, "--out", second)[0] == 0
    assert yaml.safe_load((second / "hf_prune_run.yaml").read_text())["model"] == str(first)
    code, out, _ = hf_prune("push", second, "me/pruned", "--dry-run", "--json")
    assert (code, "hf_prune_run" in out) == (0, False)


def test_a_sweep_is_repeated(hf_prune, folder, data, tmp_path):
    options = ["--sparsity", "0.3,0.5", "--criterion", "magnitude,random", "--data", data, "--scope", "global"]
    assert hf_prune("sweep", folder, *options, "--out", tmp_path / "first")[0] == 0
    written = yaml.safe_load((tmp_path / "first" / "hf_prune_run.yaml").read_text())
    assert (written["sparsity"], written["criterion"], written["scope"]) == ("0.3,0.5", "magnitude,random", "global")
    code, _, err = hf_prune("sweep", "--config", tmp_path / "first" / "hf_prune_run.yaml", "--out", tmp_path / "again")
    assert code == 0, err
    first, again = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("first", "again"))
    assert again["settings"] == first["settings"]
    assert [p["criterion"] for p in again["points"]] == ["magnitude", "magnitude", "random", "random"]


def test_a_file_of_settings_in_json_or_yaml(hf_prune, folder, tmp_path):
    config = PruningConfig(sparsity=0.3, exclude_modules=["classifier"], scope="global")
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "more.yaml").write_text(
        f"sparsity: 0.7\nexclude-modules: [classifier]\nscope: global\nout: {tmp_path}/b\n"
    )
    assert hf_prune("prune", folder, "--config", tmp_path / "config.json", "--out", tmp_path / "a")[0] == 0
    assert load_native(str(tmp_path / "a")).pruning_config == config
    code, _, err = hf_prune("prune", folder, "--config", tmp_path / "more.yaml", "--sparsity", 0.3)
    assert code == 0, err
    assert load_native(str(tmp_path / "b")).pruning_config == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsty: 0.5", "unknown setting in .*'sparsty': expected one of .* Did you mean 'sparsity'?"),
        ("command: train", "is of hf-prune train: expected one of hf-prune prune; .*: hf-prune train --config "),
        ("details: maybe", r"--config \S+run.yaml: details is 'maybe': .*valid boolean"),
        ("- 0.5", "holds a list: expected settings, such as sparsity: 0.5"),
        ("sparsity: 2", "sparsity is 2"),
        ("sparsity: [", "is not valid YAML"),
    ],
)
def test_files_that_are_none(hf_prune, folder, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    code, out, err = hf_prune("prune", folder, "--config", tmp_path / "run.yaml", "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


def test_what_is_offered_are_names_for_a_file(hf_prune, folder, tmp_path):
    (tmp_path / "run.yaml").write_text("sparsty: 0.5")
    offered = (
        hf_prune("prune", folder, "--config", tmp_path / "run.yaml")[2].split("expected one of ")[1].split(". ")[0]
    )
    names = set(offered.split(", "))
    assert names >= {"sparsity", "model", "out", "calibration_order", "dry_run"}
    assert not names & {"h", "q", "v", "help", "as_json", "json", "config"}


def test_a_config_file_that_is_not_there(hf_prune, folder, tmp_path):
    code, _, err = hf_prune("evaluate", folder, "--config", tmp_path / "none.yaml")
    assert (code, err.startswith(f"error: --config {tmp_path / 'none.yaml'} cannot be read")) == (1, True)
    with pytest.raises(UnknownNameError, match="unknown dtype"), loading_with(LoadOptions(dtype="half")):
        pass
    with pytest.raises(DataError):
        load_native(str(Path(tmp_path) / "none"))
