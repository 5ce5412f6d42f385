"""Models of every task on the command line: calibrated, scored, compared and swept."""

import json
import math
import re
import struct
import wave

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Wav2Vec2FeatureExtractor

from hf_prune import prune
from hf_prune.auto import load_native
from tests.calibration.test_read import tiny_wav2vec2
from tests.evaluation.test_examples import CASES, TEXTS, classified


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with its tokenizer, and data, for each kind of task."""
    root = tmp_path_factory.mktemp("tasks")
    for kind, (make, _) in CASES.items():
        model, reader, data = make()
        model.save_pretrained(root / kind)
        reader.save_pretrained(root / kind)
        if kind == "image-classification":
            for split in ("train", "validation"):
                for i, row in enumerate(data):
                    path = root / f"{kind}-data" / split / f"LABEL_{row['label']}" / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    row["image"].save(path)
            continue
        (root / f"{kind}-data").mkdir()
        rows = "\n".join(json.dumps(row) for row in data)
        for split in ("train", "validation"):
            (root / f"{kind}-data" / f"{split}.jsonl").write_text(rows)
    return root


@pytest.mark.parametrize("kind", sorted(set(CASES) - {"language-modeling"}))
def test_from_pruning_to_the_comparison(hf_prune, folders, tmp_path, kind):
    model, data, out = folders / kind, folders / f"{kind}-data", tmp_path / "out"
    _, label = CASES[kind]
    hf_prune("prune", model, "--criterion", "wanda", "--scope", "row", "--data", data, "--out", out)
    assert load_native(str(out)).sparsity_report().target_sparsity == pytest.approx(0.5, abs=0.02)
    said = json.loads(hf_prune("evaluate", out, "--data", data, "--against", model, "--json"))
    if kind == "classification":
        assert said["comparison"]["dense_accuracy"] == said["dense"]["accuracy"]
        return
    assert said["evaluation"]["metric"] == said["comparison"]["metric"] == label
    assert said["comparison"]["drop"] == pytest.approx(100 * (said["dense"]["value"] - said["evaluation"]["value"]))
    text = hf_prune("evaluate", out, "--data", data, "--against", model)
    assert re.search(rf"{label} .* -> .*: drop .* interval .*paired", text)
    limited = json.loads(hf_prune("evaluate", model, "--data", data, "--limit", 3, "--json"))["evaluation"]
    assert limited["n"] == len(limited["kept"]) == 3
    assert np.allclose(limited["kept"], said["dense"]["kept"][:3], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "metric", "label"),
    [
        ("classification", "matthews", "Matthews"),
        ("classification", "f1", "F1"),
        ("regression", "pearson", "Pearson"),
        ("token-classification", "accuracy", "accuracy"),
        ("question-answering", "exact_match", "exact match"),
        ("multi-label-classification", "macro_f1", "macro F1"),
        ("image-classification", "macro_f1", "macro F1"),
        ("text-generation", "exact_match", "exact match"),
    ],
)
def test_other_metrics(hf_prune, folders, kind, metric, label):
    options = ["--data", folders / f"{kind}-data", "--metric", metric]
    assert f": {label} " in hf_prune("evaluate", folders / kind, *options)


def test_numbers_of_classes_in_a_table_are_texts(hf_prune, folders, tmp_path):
    rows = [json.loads(line) for line in (folders / "classification-data" / "train.jsonl").read_text().splitlines()]
    lines = ["sentence\tlabel", *(f"{row['sentence']}\t{row['label']}" for row in rows)]
    (tmp_path / "some.tsv").write_text("\n".join(lines) + "\n")
    options = ["--metric", "f1", "--json", "--data"]
    found, expected = (
        json.loads(hf_prune("evaluate", folders / "classification", *options, data))["evaluation"]
        for data in (tmp_path / "some.tsv", folders / "classification-data" / "train.jsonl")
    )
    assert found["kept"] == expected["kept"]
    (tmp_path / "some.tsv").write_text("\n".join([*lines, "w1\t7"]) + "\n")
    error = hf_prune("evaluate", folders / "classification", *options, tmp_path / "some.tsv", code=1)
    assert f"row 25 of '{tmp_path / 'some.tsv'}': label 7 is not a class, expected 0 to 1" in error


@pytest.mark.filterwarnings("ignore:the dense model has")  # which is random
@pytest.mark.parametrize("kind", ["token-classification", "image-classification", "language-modeling", "regression"])
def test_a_sweep(hf_prune, folders, tmp_path, kind):
    options = ["--data", folders / f"{kind}-data", "--sparsity", "0.5,0.9", "--out", tmp_path]
    options += ["--criterion", "taylor" if kind == "image-classification" else "magnitude"]
    result = json.loads(hf_prune("sweep", folders / kind, *options, "--json"))
    assert result["dense"]["metric"] == CASES[kind][1]
    assert [p["sparsity"] for p in result["points"]] == [0.5, 0.9]
    assert (tmp_path / "tradeoff.png").is_file()
    again = json.loads(hf_prune("sweep", folders / kind, *options, "--json"))
    assert again["points"] == result["points"]  # read, not measured


def test_a_text_alone_calibrates_a_model_of_any_task(hf_prune, folders, tmp_path):
    (tmp_path / "some.txt").write_text("\n".join(TEXTS))
    for kind in ("token-classification", "question-answering", "text-generation", "regression"):
        options = ["--criterion", "wanda", "--data", tmp_path / "some.txt"]
        hf_prune("prune", folders / kind, *options, "--out", tmp_path / kind)
        assert load_native(str(tmp_path / kind)).masks


def test_sounds_calibrate(hf_prune, tmp_path):
    tiny_wav2vec2().save_pretrained(tmp_path / "model")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "model")
    for i in range(3):
        samples = [int(9000 * math.sin(k / (5 + i))) for k in range(400 + 50 * i)]
        path = tmp_path / "sounds" / f"{i}.wav"
        path.parent.mkdir(exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(struct.pack(f"<{len(samples)}h", *samples))
    options = ["--criterion", "wanda", "--scope", "row", "--data", tmp_path / "sounds"]
    hf_prune("prune", tmp_path / "model", *options, "--out", tmp_path / "out")
    found = load_native(str(tmp_path / "out"))
    sounds = []
    for i in range(3):
        with wave.open(str(tmp_path / "sounds" / f"{i}.wav")) as file:
            content = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2") / 32768
        sounds.append({"array": content, "sampling_rate": 16_000})
    expected = load_native(str(tmp_path / "model"))
    prune(expected, 0.5, criterion="wanda", scope="row", calibration=sounds)
    kept = [(found.masks[name] == expected.masks[name]).float().mean() for name in expected.masks]
    assert torch.stack(kept).min() > 0.95  # sums in another order may tie another way
    error = hf_prune("evaluate", tmp_path / "model", "--data", tmp_path / "sounds", "--split", "train", code=1)
    assert "this model has no task that is scored or trained here" in error


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("token-classification", ["--metric", "rouge_l"], "metric is 'rouge_l': of token-classification, expected"),
        (
            "token-classification",
            ["--text-column", "x"],
            "has no column 'x' (found: tokens, ner_tags): name it with --te",
        ),
        ("question-answering", ["--label-column", "x"], "has no column 'x' (found: question, context, answers)"),
        ("image-classification", ["--split", "test"], "no split 'test' in"),
    ],
)
def test_what_does_not_fit_is_said(hf_prune, folders, kind, options, message):
    error = hf_prune("evaluate", folders / kind, "--data", folders / f"{kind}-data", *options, code=1)
    assert message in error


def test_images_without_data_are_asked_for(hf_prune, folders, tmp_path):
    arguments = ["prune", folders / "image-classification", "--criterion", "wanda", "--out", tmp_path / "x"]
    assert "pass images, in a folder with a subfolder for each class" in hf_prune(*arguments, code=1)
    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    assert classified()[0].config.num_labels == 2


def test_a_card_and_its_verification(hf_prune, folders, tmp_path):
    kind, out = "token-classification", tmp_path / "out"
    model, data = folders / kind, folders / f"{kind}-data"
    hf_prune("prune", model, "--sparsity", 0.3, "--out", out)
    scores = tmp_path / "scores.json"
    scores.write_text(hf_prune("evaluate", out, "--data", data, "--against", model, "--json"))
    hf_prune("card", out, "--evaluation", scores, "--dataset", "me/entities", "--write")
    card = (out / "README.md").read_text()
    values = json.loads(scores.read_text())
    assert "entity F1" in card
    assert f"{values['evaluation']['value']:.4f} ± {values['evaluation']['standard_error']:.4f}" in card
    assert f"the drop is {values['comparison']['drop']:.2f} points" in card
    assert "paired p = " in card
    assert "What was counted is right." in hf_prune("verify", out, "--evaluate", "--data", data)
    edited = {**values, "evaluation": {**values["evaluation"], "value": 0.99}}
    scores.write_text(json.dumps(edited))
    assert "cannot be true" in hf_prune("card", out, "--evaluation", scores, code=1)
