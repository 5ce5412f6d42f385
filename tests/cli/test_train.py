"""hf-prune train and hf-prune lottery, from a folder to a folder."""

import hashlib
import json
import re
import runpy
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_prune.checkpoint.files import MASK_FILE
from hf_prune.checkpoint.mask_file import load_masks
from hf_prune.training.state import last_whole_checkpoint, save_training
from hf_prune.utils.locks import output_lock
from tests import models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    models.tiny_classifier(seed=4).save_pretrained(root / "text")
    models.tiny_llama().save_pretrained(root / "llama")
    for name in ("text", "llama"):
        models.tiny_tokenizer().save_pretrained(root / name)
    (root / "data").mkdir()
    for split, n, seed in (("train", 64, 1), ("dev", 24, 0)):
        rows = models.tiny_sentences(n, seed)
        lines = [f"{text}\t{label}" for text, label in zip(rows["sentence"], rows["label"], strict=True)]
        (root / "data" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    (root / "texts").mkdir()
    for split, n, seed in (("train", 80, 1), ("test", 40, 0)):
        (root / "texts" / f"{split}.txt").write_text("\n".join(models.tiny_sentences(n, seed)["sentence"]))
    return root


@pytest.fixture
def run(hf_prune):
    return hf_prune


def zeros(model, part):
    weights = [p for n, p in model.named_parameters() if part in n and p.dim() == 2]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("command", ["train", "lottery"])
def test_training_and_scoring_on_the_same_sentences(folders, run, tmp_path, command):
    options = (command, folders / "text", "--out", tmp_path / "out", "--sparsity", 0.5)
    said = run(*options, "--data", folders / "data", "--split", "dev", code=1)
    assert "error: the split 'dev' is trained and scored on: expected two" in said
    said = run(*options, "--data", folders / "data" / "train.tsv", code=1)
    assert "train.tsv' is trained and scored on: expected two splits, so pass a folder" in said
    assert not (tmp_path / "out").exists()


def test_a_classifier_with_itself_as_teacher(folders, run, tmp_path):
    out = tmp_path / "pruned"
    said = run(
        *("train", folders / "text", "--data", folders / "data", "--out", out, "--sparsity", 0.75),
        *("--target-modules", "query,dense", "--teacher", "self", "--batch-size", 8, "--every", 2, "--epochs", 2),
    )
    assert said.rstrip().endswith(f"Saved in {out}.")
    assert "before: accuracy" in said
    assert "McNemar" in said
    assert "Trained for 16 steps" in said
    model = AutoModelForSequenceClassification.from_pretrained(out)
    masks = load_masks(out / MASK_FILE).masks
    removed = sum(int((~mask).sum()) for mask in masks.values())
    assert removed == round(0.75 * sum(mask.numel() for mask in masks.values()))
    assert all(not bool(model.get_parameter(name)[~mask].any()) for name, mask in masks.items())
    AutoTokenizer.from_pretrained(out)
    report = json.loads((out / "training_report.json").read_text())
    assert report["steps"] == 16
    assert report["comparison"]["n"] == 24
    assert {"dense", "pruned", "sparsity"} <= report.keys()
    again = run("train", out, "--keep-masks", "--data", folders / "data", "--out", tmp_path / "more", "--json")
    assert json.loads(again)["steps"] == 2
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "more")
    assert all(not bool(model.get_parameter(name)[~mask].any()) for name, mask in masks.items())


def test_heads_are_taken_out_on_the_way(folders, run, tmp_path):
    said = run(
        *("train", folders / "text", "--data", folders / "data", "--out", tmp_path / "small", "--batch-size", 8),
        *("--granularity", "head,neuron", "--criterion", "movement", "--begin", 2, "--end", 5, "--shrink-at", 6),
    )
    assert "Shrunk: " in said
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    whole = AutoModelForSequenceClassification.from_pretrained(folders / "text")
    assert small.num_parameters() < whole.num_parameters()


def test_a_language_model_goes_on_from_its_checkpoints(folders, run, tmp_path):
    command = ("train", folders / "llama", "--data", folders / "texts", "--window", 8, "--batch-size", 4)
    command = (*command, "--schedule", "one_shot", "--begin", "0.5", "--granularity", "2:4")
    whole = run(*command, "--out", tmp_path / "a", "--checkpoints", tmp_path / "c")
    assert "perplexity" in whole
    checkpoints = sorted((tmp_path / "c").glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2]))
    assert len(checkpoints) == 2
    (checkpoints[1] / "pruning_state.safetensors").unlink()  # as if it had been killed while it saved the last one
    with pytest.warns(UserWarning, match=rf"skipping an incomplete checkpoint: .*{checkpoints[1].name} has"):
        assert last_whole_checkpoint(tmp_path / "c") == checkpoints[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(*command, "--out", tmp_path / "b", "--checkpoints", tmp_path / "c")
    assert (checkpoints[1] / "pruning_state.safetensors").is_file()
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "a"), "q_proj") == pytest.approx(0.5, abs=0.01)


def test_two_runs_do_not_share_a_folder_of_checkpoints(folders, run, tmp_path):
    """Whatever their outputs are: each would go on from what the other one saves, and delete it."""
    command = ("train", folders / "text", "--data", folders / "data", "--checkpoints", tmp_path / "c")
    with ThreadPoolExecutor(1) as other:
        lock = output_lock(tmp_path / "c", "train")
        other.submit(lock.__enter__).result()
        said = run(*command, "--out", tmp_path / "out", code=1)
        assert re.search(r"c is being written by process \d+ \(hf-prune train\): wait until it is done", said)
        other.submit(lock.__exit__, None, None, None).result()
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "out").exists()


@pytest.fixture
def begun(folders, run, tmp_path):
    """A finished training with its checkpoints, and how it was called."""
    command = ["train", folders / "text", "--data", folders / "data", "--sparsity", 0.5, "--batch-size", 32]
    command += ["--criterion", "magnitude"]
    command += ["--checkpoints", tmp_path / "c", "--out", tmp_path / "out"]
    run(*command)
    return command


def test_two_trainings_are_not_mixed(folders, run, tmp_path, begun):
    """Whatever makes it another training, the folder says what it began as and stays as it was."""
    models.tiny_classifier(seed=5).save_pretrained(tmp_path / "other")
    models.tiny_tokenizer().save_pretrained(tmp_path / "other")
    shutil.copytree(folders / "text", tmp_path / "dropout")
    config = json.loads((folders / "text" / "config.json").read_text())
    (tmp_path / "dropout" / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.4}))
    shutil.copytree(folders / "data", tmp_path / "edited")
    lines = (tmp_path / "edited" / "train.tsv").read_text().splitlines()
    lines[41] = lines[41][:-1] + str(1 - int(lines[41][-1]))
    (tmp_path / "edited" / "train.tsv").write_text("\n".join(lines) + "\n")
    before = {path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()}
    saved = (tmp_path / "out" / "model.safetensors").read_bytes()
    for changed, name in (
        (["train", tmp_path / "other", *begun[2:]], "weights was '"),
        (["train", tmp_path / "dropout", *begun[2:]], r"model config: hidden_dropout_prob was 0\.\d+, now 0\.4"),
        ([*begun, "--split", "dev", "--score-split", "train"], "data: length was 64, now 24"),
        ([*begun, "--data", tmp_path / "edited"], "data: contents was '"),  # one label in the middle
        ([*begun, "--learning-rate", 1e-3], r"arguments: --learning-rate was 5e-05, now 0\.001"),
        ([*begun, "--seed", 3], "arguments: seed was 0, now 3"),
        ([*begun, "--epochs", 2], r"arguments: num_train_epochs was 1\.0, now 2\.0"),
        ([*begun, "--teacher", "self"], "teacher was None"),
    ):
        said = run(*changed, code=1)
        assert re.search(
            rf"belongs to another training \(.*{name}.*: expected the same settings, data and model.*--allow-changes ",
            said,
        ), said
    for allowed in ([], ["--allow-changes"]):
        said = run(*begun, "--sparsity", 0.6, *allowed, code=1)
        assert "was pruned with other settings (pruning_config: sparsity was 0.5, now 0.6)" in said
    assert {path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()} == before
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == saved
    assert "Saved in" in run(*begun, "--learning-rate", 1e-3, "--allow-changes")
    assert "add --checkpoints" in run(*begun[:-4], "--out", tmp_path / "more", "--allow-changes", code=1)


def test_checkpoints_of_earlier_versions(folders, run, tmp_path, monkeypatch, request):
    """They say nothing of their training: a file beside them does, and is still read."""
    monkeypatch.setattr("hf_prune.training.callback.save_training", without_run)
    begun = request.getfixturevalue("begun")
    assert "does not say which training it belongs to, as an earlier version made it" in run(*begun, code=1)
    model = AutoModelForSequenceClassification.from_pretrained(folders / "text")
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + weight.detach().numpy().tobytes())
    before = {
        "model": digest.hexdigest()[:16],
        "model config": {"class": "BertForSequenceClassification", "hidden_dropout_prob": 0.1},
        "data": "5fb5e9d401f851cf",
        "calibration data": "e3b0c44298fc1c14",
        "pruning config": {"sparsity": 0.5, "criterion": "magnitude"},
        **{"teacher": None, "distillation": None, "shrink_at": None, "split": "train", "epochs": 1.0},
        **{"learning_rate": 5e-5, "batch_size": 32, "accumulation": 1, "warmup": 0.05, "bf16": False, "seed": 0},
    }
    path = tmp_path / "c" / "training_run.json"
    for text, match in (
        ("[1]", "holds a JSON list: expected an object"),
        ("{", "training_run.json is damaged.*--allow-changes"),
        (
            json.dumps({**before, "data": "5fb5e9d401f851ce"}),
            "training_run.json belongs to another training .data was '",
        ),
        (json.dumps({**before, "model": "5fb5e9d401f851ce"}), "belongs to another training .model was '"),
        (json.dumps({**before, "seed": 1}), "belongs to another training .seed was 1, now 0"),
    ):
        path.write_text(text)
        said = run(*begun, code=1)
        assert re.search(match, said), said
    path.write_text(json.dumps(before))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(*begun)
    path.unlink()
    run(*begun, "--allow-changes")


def without_run(folder, store, state, facts):
    save_training(folder, store, state, {k: v for k, v in facts.items() if k not in ("run", "weights_now")})


def test_lottery(folders, run, tmp_path):
    out = tmp_path / "ticket"
    said = run(
        *("lottery", folders / "text", "--data", folders / "data", "--out", out, "--rounds", 2, "--sparsity", 0.75),
        *("--target-modules", "query,dense", "--rewind-to", 1, "--batch-size", 16),
    )
    assert [line.split()[:2] for line in said.splitlines()[2:5]] == [["0", "0.00"], ["1", "50.00"], ["2", "75.00"]]
    assert zeros(AutoModelForSequenceClassification.from_pretrained(out), "query") == pytest.approx(0.75, abs=0.01)
    ticket = load_file(out / "ticket.safetensors")
    name = next(name for name in ticket if name.endswith("query.weight"))
    assert float((ticket[name] == 0).float().mean()) == pytest.approx(0.75, abs=0.01)
    assert len(json.loads((out / "lottery.json").read_text())["rounds"]) == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--keep-masks", "--sparsity", "0.5"], "--keep-masks prunes nothing more"),
        (["--begin", "soon"], "--begin is 'soon': expected a number of steps"),
        (["--schedule", "sudden"], "unknown schedule 'sudden'"),
        (["--begin", "5", "--end", "900"], "and the training has"),
        (["--keep-masks"], "has no masks to keep"),
        (["--teacher", "nowhere/at-all"], "nowhere/at-all"),
        (["--shrink-at", "1"], "expected one from"),
    ],
)
def test_errors_leave_nothing_behind(folders, run, tmp_path, options, match):
    out = tmp_path / "out"
    err = run("train", folders / "text", "--data", folders / "data", "--out", out, "--batch-size", 8, *options, code=1)
    assert match in err
    assert not out.exists()


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # a default of the Trainer
def test_the_example_script(folders, tmp_path, capsys, monkeypatch):
    script = Path(__file__).parents[2] / "examples" / "prune_while_training.py"
    monkeypatch.setattr("sys.argv", [str(script), *map(str, (folders / "text", folders / "data", tmp_path / "out"))])
    runpy.run_path(str(script), run_name="__main__")
    assert "accuracy" in capsys.readouterr().out
    assert zeros(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"), "layer") > 0.75
