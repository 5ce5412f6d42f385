"""hf-prune auto for models that are neither sequence classifiers nor language models, and for other metrics."""

import json
from dataclasses import replace

import pytest
import torch

from hf_prune.search.goals import GOALS
from tests import models
from tests.evaluation.test_examples import CASES, tagged

OPTIONS = ("--goal", "sparser", "--presets", "fast", "--calibration-samples", 8, "--held-out", 24)


@pytest.fixture(autouse=True)
def one_level(monkeypatch):
    """A single candidate; test_auto_prune.py is about the others."""
    monkeypatch.setitem(GOALS, "sparser", replace(GOALS["sparser"], levels=(0.5,)))


def save_tagger(root):
    """A token classifier, and words with the labels that it gives them, in two splits."""
    model, tokenizer, _ = tagged()
    with torch.no_grad():
        model.classifier.weight.mul_(50)  # else it gives one label to all
    (root / "data").mkdir()
    for seed, split in ((1, "train"), (2, "validation")):
        words = [text.split() for text in models.tiny_sentences(60, seed)["sentence"]]
        with torch.no_grad():
            logits = [model(**tokenizer(" ".join(row), return_tensors="pt")).logits[0] for row in words]
        tags = [each.argmax(-1).tolist() for each in logits]
        skipped = tokenizer("w1")["input_ids"].index(tokenizer.convert_tokens_to_ids("w1"))
        rows = [{"tokens": w, "ner_tags": t[skipped : skipped + len(w)]} for w, t in zip(words, tags, strict=True)]
        (root / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root / "model", root / "data"


def save_encoder(root):
    """A sentence encoder, and pairs with the similarities that it gives them, in two splits."""
    from tests.sentence_models import pairs, tiny_encoder

    encoder = tiny_encoder(root / "bert")
    (root / "data").mkdir()
    for seed, split in ((1, "train"), (5, "validation")):
        rows = pairs(60, seed)
        first, second = (encoder.encode([row[i] for row in rows], convert_to_tensor=True) for i in (0, 1))
        scores = encoder.similarity_pairwise(first, second).tolist()
        lines = [f"{a}\t{b}\t{score:.6f}" for (a, b), score in zip(rows, scores, strict=True)]
        (root / "data" / f"{split}.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *lines]) + "\n")
    encoder.save(str(root / "model"))
    return root / "model", root / "data"


def test_a_token_classifier(hf_prune, tmp_path):
    model, data = save_tagger(tmp_path)
    out = tmp_path / "out"
    arguments = ("auto", model, "--data", data, *OPTIONS, "--out", out, "--max-drop", 99)
    said = hf_prune(*arguments)
    assert "Scored on 24 held-out examples of data train; lost in points of entity F1." in said
    results = json.loads((out / "results.json").read_text())
    [point] = results["points"]
    assert results["dense_score"] > 0.9
    assert point["loss"]["value"] == pytest.approx(100 * (results["dense_score"] - point["score"]))
    score = json.loads(hf_prune("evaluate", out / "model", "--data", data, "--against", model, "--json"))
    drop = score["comparison"]["drop"]
    assert "On a split that had no influence: validation: entity F1" in said
    assert f"drop {drop:.2f} points" in said
    assert f"| this model | {score['evaluation']['value']:.4f} ±" in (out / "model" / "README.md").read_text()
    assert "What was counted is right." in hf_prune("verify", out / "model", "--evaluate", "--data", data)
    assert "a search of other settings (task was" in hf_prune(*arguments, "--metric", "accuracy", code=1)
    flips = hf_prune(*arguments[:-2], "--max-flips", 5, "--overwrite", code=1)
    assert "BertForTokenClassification does not give: it is scored by entity F1; use --max-drop, in points" in flips


def test_a_sentence_encoder_whose_card_has_the_held_out_score(hf_prune, tmp_path):
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    from sentence_transformers import SentenceTransformer

    model, data = save_encoder(tmp_path)
    (data / "validation.tsv").unlink()
    out = tmp_path / "out"
    said = hf_prune("auto", model, "--data", data, *OPTIONS, "--out", out, "--max-drop", 99)
    assert "Scored on 24 held-out rows of data train; lost in points of Spearman." in said
    results = json.loads((out / "results.json").read_text())
    assert results["dense_score"] > 0.99
    card = (out / "model" / "README.md").read_text()
    assert "held out from calibration, but this model was chosen on it" in card
    assert f"| this model | {results['points'][0]['score']:.4f} ±" in card
    pruned, dense = (
        SentenceTransformer(str(folder), device="cpu", local_files_only=True) for folder in (out / "model", model)
    )
    assert [type(module) for module in pruned] == [type(module) for module in dense]
    zeros = sum(int((p == 0).sum()) for p in pruned.parameters())
    assert zeros / sum(p.numel() for p in pruned.parameters()) > 0.2
    assert "What was counted is right." in hf_prune("verify", out / "model", "--evaluate", "--data", data)


def save_cross_encoder(root):
    """A model that reads pairs, and queries, of whose four documents the one is relevant that it scores highest."""
    from tests.sentence_models import texts, tiny_cross_encoder

    cross = tiny_cross_encoder(root / "bert")
    (root / "data").mkdir()
    for seed, split in ((1, "train"), (5, "validation")):
        rows = [(f"w{i // 4} w{i // 4 + 1}", text) for i, text in enumerate(texts(160, seed))]
        scores = cross.predict(rows)
        lines = [
            f"{query}\t{text}\t{int(score == max(scores[i // 4 * 4 : i // 4 * 4 + 4]))}"
            for i, ((query, text), score) in enumerate(zip(rows, scores, strict=True))
        ]
        (root / "data" / f"{split}.tsv").write_text("\n".join(["query\tdocument\tscore", *lines]) + "\n")
    cross.save(str(root / "model"))
    return root / "model", root / "data"


def test_a_cross_encoder_that_ranks(hf_prune, tmp_path):
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    from sentence_transformers import CrossEncoder

    model, data = save_cross_encoder(tmp_path)
    out = tmp_path / "out"
    said = hf_prune("auto", model, "--data", data, *OPTIONS, "--out", out, "--max-drop", 99)
    results = json.loads((out / "results.json").read_text())
    assert results["dense_score"] == 1.0
    assert "On a split that had no influence: validation: nDCG@10" in said
    pruned = CrossEncoder(str(out / "model"), device="cpu", local_files_only=True)
    zeros = sum(int((p == 0).sum()) for p in pruned.parameters())
    assert zeros / sum(p.numel() for p in pruned.parameters()) > 0.2
    assert "What was counted is right." in hf_prune("verify", out / "model", "--evaluate", "--data", data)


@pytest.mark.parametrize(("kind", "metric"), [("question-answering", "answer F1"), ("text-generation", "ROUGE-L")])
def test_questions_and_texts_to_write(hf_prune, tmp_path, kind, metric):
    model, reader, data = CASES[kind][0]()
    model.save_pretrained(tmp_path / "model")
    reader.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for seed, split in ((1, "train"), (2, "validation")):
        texts = models.tiny_sentences(40, seed)["sentence"]
        key = "question" if kind == "question-answering" else "document"
        rows = [{**data[i % len(data)], key: text} for i, text in enumerate(texts)]
        for row in rows if kind == "text-generation" else ():  # the truth is what the dense model writes
            said = model.generate(**reader(row[key], return_tensors="pt"), do_sample=False)[0]
            row["summary"] = reader.decode(said, skip_special_tokens=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    arguments = ("--data", tmp_path / "data")
    said = hf_prune("auto", tmp_path / "model", *arguments, *OPTIONS, "--out", out, "--max-drop", 99)
    assert f"Scored on 24 held-out examples of data train; lost in points of {metric}." in said
    results = json.loads((out / "results.json").read_text())
    [point] = results["points"]
    assert point["loss"]["value"] == pytest.approx(100 * (results["dense_score"] - point["score"]))
    score = json.loads(hf_prune("evaluate", out / "model", *arguments, "--json"))["evaluation"]
    assert score["metric"] == metric
    assert f"| this model | {score['value']:.4f} ±" in (out / "model" / "README.md").read_text()
    assert "What was counted is right." in hf_prune("verify", out / "model", "--evaluate", *arguments)


def test_changed_answers_count_whatever_the_metric_of_classes(hf_prune, tmp_path):
    classifier = models.tiny_classifier(seed=4)
    rows = models.answered_sentences(60, 1, classifier)
    lines = [f"{text}\t{label}" for text, label in zip(rows["sentence"], rows["label"], strict=True)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    classifier.save_pretrained(tmp_path / "model")
    models.tiny_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ("auto", tmp_path / "model", "--data", tmp_path / "train.tsv", *OPTIONS, "--out", tmp_path / "out")
    said = hf_prune(*arguments, "--metric", "matthews", "--max-flips", 99, "--json")
    result = json.loads(said)
    assert result["unit"] == "% of answers changed"
    assert result["settings"]["task"]["metric"] == "Matthews"
    assert 0 < result["points"][0]["loss"]["value"] < 99


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("language-modeling", ("--metric", "f1"), "is a language model, scored by perplexity: leave it out"),
        ("token-classification", ("--metric", "matthews"), "metric is 'matthews': of token-classification, expected"),
        ("regression", ("--text-column", "x"), "has no column 'x'"),
        ("regression", ("--max-flips", 2), "BertForSequenceClassification does not give: it is scored by Spearman"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(hf_prune, tmp_path, kind, options, message):
    model, reader, data = CASES[kind][0]()
    model.save_pretrained(tmp_path / "model")
    reader.save_pretrained(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in data))
    arguments = ("auto", tmp_path / "model", "--data", tmp_path / "train.jsonl", *OPTIONS, "--out", tmp_path / "out")
    assert message in hf_prune(*arguments, *options, code=1)
    assert not (tmp_path / "out" / "results.json").exists()
