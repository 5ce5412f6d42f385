"""hf-prune prune --stream."""

import json
from pathlib import Path

import pytest
import torch

from hf_prune import PruningConfig, prune_stream, text_batches, token_windows
from hf_prune.auto import load_native
from hf_prune.cli.main import main
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.data.classification import sample_order
from hf_prune.evaluation.data.loading import load_texts
from hf_prune.evaluation.tasks import ExampleTask
from tests import models
from tests.conversion.test_stream import contents, saved


@pytest.fixture
def source(tmp_path) -> Path:
    models.tiny_tokenizer().save_pretrained(tmp_path / "source")
    return saved(models.tiny_llama(), tmp_path / "source")


@pytest.fixture
def texts(tmp_path) -> list[str]:
    """Sentences without labels, in a folder ``data``."""
    sentences = models.tiny_sentences(30)["sentence"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps({"line": s}) + "\n" for s in sentences))
    return sentences


REPORTS = ("pruning_card", "sparsity_report")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def without_card(folder):
    return {k: v for k, v in contents(folder).items() if k not in ("README.md", "pruning_card.json")}


def test_without_data(source, tmp_path, capsys):
    assert run("prune", source, "--stream", "--sparsity", "0.3", "--scope", "global", "--out", tmp_path / "out") == 0
    assert f"Saved:   {tmp_path / 'out'} (" in capsys.readouterr().out
    prune_stream(source, 0.3, tmp_path / "expected", scope="global")
    assert without_card(tmp_path / "out") == contents(tmp_path / "expected")
    assert "- pruned\n" in (tmp_path / "out" / "README.md").read_text()
    facts, report = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in REPORTS)
    assert facts["report"]["nonzero"] == report["nonzero"]
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_unlabelled_texts(kind, texts, tmp_path, capsys):
    """Windows of tokens for a language model, one text after the other for any other."""
    tokenizer = models.tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "source")
    source = saved(models.TRANSFORMERS[kind](), tmp_path / "source")
    options = ["--data", tmp_path / "data", "--text-column", "line", "--calibration-samples", 12, "--window", 8]
    out = tmp_path / "out"
    assert run("prune", source, "--stream", "--criterion", "sparsegpt", *options, "--out", out, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report.pop("run")["out"] == str(out)
    if kind == "llama":
        batches = token_windows(texts, tokenizer, n=12, length=8)
    else:
        batches = text_batches([texts[i] for i in sample_order(30)[:12]], tokenizer)
    prune_stream(source, PruningConfig(criterion="sparsegpt"), tmp_path / "expected", calibration=batches)
    assert without_card(out) == contents(tmp_path / "expected")
    assert report == json.loads((out / "sparsity_report.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_labels_are_read_where_the_criterion_needs_them(kind, tmp_path):
    """The same batches, and so the same masks, as without --stream; two text columns are no obstacle."""
    models.tiny_tokenizer().save_pretrained(tmp_path / "source")
    source = saved(models.TRANSFORMERS[kind](), tmp_path / "source")
    rows = models.tiny_sentences(30)
    lines = [
        json.dumps({"text": text, "other": text[::-1], "label": label})
        for text, label in zip(rows["sentence"], rows["label"], strict=True)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    columns = (
        ["--text-column", "text"] if kind == "llama" else ["--text-column", "text,other", "--label-column", "label"]
    )
    options = ["--data", tmp_path / "train.jsonl", *columns, "--calibration-samples", 12, "--criterion", "taylor"]
    assert run("prune", source, *options, "--sparsity", 0.5, "--out", tmp_path / "expected") == 0
    assert run("prune", source, *options, "--sparsity", 0.5, "--out", tmp_path / "out", "--stream") == 0
    masks = [(tmp_path / name / "pruning_masks.safetensors").read_bytes() for name in ("expected", "out")]
    assert masks[0] == masks[1]


def test_labels_of_other_tasks_are_not_streamed():
    task = ExampleTask("token-classification", "data")
    with pytest.raises(ConfigError, match="--stream reads labels of sequence classifiers and language models alone"):
        task.streaming_batches(models.tiny_tokenizer(), None, {"O": 0})


def test_a_tokenizer_without_padding_pads_with_what_it_has(source, texts, tmp_path):
    path = source / "tokenizer_config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key != "pad_token"}
    path.write_text(json.dumps({**values, "eos_token": "[SEP]"}))
    options = ["--data", tmp_path / "data", "--text-column", "line", "--criterion", "wanda"]
    assert run("prune", source, "--stream", *options, "--out", tmp_path / "out") == 0
    assert len(load_native(str(tmp_path / "out")).masks) == 14


def test_dry_run(source, tmp_path, capsys):
    assert run("prune", source, "--stream", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out) == load_native(str(source)).plan(PruningConfig()).to_dict()


def test_it_resumes_and_restarts(source, tmp_path, monkeypatch, capsys):
    from hf_prune.conversion.streaming import output as stream_output

    write, left = stream_output.write_tensor, [5]

    def interrupted(*args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(stream_output, "write_tensor", interrupted)
    arguments = ["prune", source, "--stream", "--out", tmp_path / "out"]
    assert run(*arguments) == 130
    assert "the same command continues where it was." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(*arguments, "--sparsity", "0.6") == 1
    assert "differs in settings: repeat that run to finish it" in capsys.readouterr().err
    assert run(*arguments, "--sparsity", "0.6", "--restart") == 0
    masks = load_native(str(tmp_path / "out")).masks
    assert sum(int((~m).sum()) for m in masks.values()) == sum(round(0.6 * m.numel()) for m in masks.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stream", "--plots"], "--stream never holds the model, which --plots needs: leave one out"),
        (["--stream", "--max-drop", "1"], "--stream never holds the model, which --max-drop needs"),
        (["--restart"], "--restart is for a streaming run: add --stream"),
        (["--stream", "--criterion", "taylor", "--steps", "3"], "steps=3 takes gradients of a model that is pruned"),
        (["--stream", "--polish", "distill"], "a polish trains the whole model, which streaming never holds"),
        (["--stream", "--criterion", "fisher"], "criterion 'fisher' needs"),
        (["--stream", "--criterion", "wanda", "--data", "data", "--text-column", "x"], "has no column 'x'"),
    ],
)
def test_errors(options, message, source, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("prune", source, "--out", "out", *options) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "source"]


def test_no_tokenizer(texts, tmp_path, capsys):
    source = saved(models.tiny_llama(), tmp_path / "bare")
    options = ["--criterion", "wanda", "--data", tmp_path / "data", "--text-column", "line"]
    assert run("prune", source, "--stream", *options, "--out", tmp_path / "out") == 1
    assert "has no tokenizer, which calibration on texts needs: save it beside" in capsys.readouterr().err


def test_texts_need_no_labels(texts, tmp_path):
    assert load_texts(tmp_path / "data", "train", text_column="line") == texts
    (tmp_path / "data" / "dev.jsonl").write_text('{"line": 5}\n')
    with pytest.raises(DataError, match=r"row 1 of split 'dev' of .*: 'line' is 5, expected text"):
        load_texts(tmp_path / "data", "dev", text_column="line")


def test_the_masks_are_those_of_the_command_without_stream(source, tmp_path):
    assert run("prune", source, "--stream", "--granularity", "2:4", "--out", tmp_path / "a") == 0
    assert run("prune", source, "--granularity", "2:4", "--out", tmp_path / "b") == 0
    a, b = load_native(str(tmp_path / "a")), load_native(str(tmp_path / "b"))
    models.assert_unchanged(a, models.snapshot(b))
    assert all(torch.equal(a.masks[name], mask) for name, mask in b.masks.items())
    assert (tmp_path / "a" / "sparsity_report.json").read_text() == (
        tmp_path / "b" / "sparsity_report.json"
    ).read_text()
    also = {"model.safetensors", "README.md", "pruning_card.json"}  # a stream writes no card
    assert {p.name for p in (tmp_path / "b").iterdir()} <= {p.name for p in (tmp_path / "a").iterdir()} | also
