"""What is held out of a calibration split, for tasks of every kind: nothing that calibration saw."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hf_prune import DataError, ExampleTask, PruningConfig, SentenceTask
from tests import models
from tests.evaluation.test_examples import pictured, tagged

WANDA = [PruningConfig(0.5, criterion="wanda")]
POLISHED = PruningConfig(0.5, criterion="wanda", polish="distill")
CROSS = SimpleNamespace(predict=None)  # what a task asks of a CrossEncoder


def words_of(batches):
    """The texts of some batches, one of each row."""
    tokenizer = models.tiny_tokenizer()
    return tokenizer.batch_decode([row for batch in batches for row in batch["input_ids"]], skip_special_tokens=True)


def table(path, rows, columns):
    path.write_text("\n".join("\t".join(map(str, row)) for row in [columns, *rows]) + "\n")
    return str(path)


def test_lists_of_words_share_no_five_in_a_row_with_those_of_calibration(tmp_path):
    rows = [[f"w{i + k}" for k in range(7)] for i in range(0, 42, 7)]  # each word in one row
    rows += [[*row[:6], "w0"] for row in rows]  # and once more, in one that differs in its last word
    lines = [json.dumps({"tokens": row, "ner_tags": [0] * 7}) for row in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    task = ExampleTask("token-classification", str(tmp_path), calibration_samples=3)
    model, tokenizer, _ = tagged()
    seen = {tuple(text.split()[:6]) for text in words_of(task.calibration_batches(WANDA, model, tokenizer))}
    found = [tuple(row[:6]) for row in task.held_out(100)["tokens"]]
    assert 0 < len(seen) <= 3
    assert sorted(found) == sorted(tuple(row[:6]) for row in rows if tuple(row[:6]) not in seen)
    assert task.held_out(4)["tokens"] == task.held_out(100)["tokens"][:4]  # in a fixed order
    with pytest.raises(DataError, match="has 12 examples, and calibration may see 12: none remains to score that sh"):
        task.held_out(4, 12)


def test_images_are_other_rows(tmp_path):
    for i in range(8):
        path = tmp_path / "train" / f"LABEL_{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 6), (30 * i, 30 * i, 30 * i)).save(path)
    task = ExampleTask("image-classification", str(tmp_path), calibration_samples=3)
    model, processor, _ = pictured()
    [batch] = task.calibration_batches(WANDA, model, processor)
    grey = (batch["pixel_values"].mean((1, 2, 3)).numpy() / 2 + 0.5) * 255
    held_out = [np.asarray(image).mean() for image in task.held_out(100)["image"]]
    assert np.allclose(sorted([*grey, *held_out]), [30 * i for i in range(8)], atol=1)
    assert len(held_out) == 5
    with pytest.raises(DataError, match="calibration may see 8: none remains to score; calibrate on fewer"):
        task.held_out(1, 8)


@pytest.mark.parametrize("make", ["tiny_encoder", "tiny_cross_encoder"])
def test_pairs_share_no_text_with_those_of_calibration(tmp_path, make):
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    from tests import sentence_models

    pairs = [(f"w{i}", f"w{i + 20}", i / 20) for i in range(20)] + [("w40", f"w{i}", 1.5) for i in range(20)]
    task = SentenceTask(table(tmp_path / "x.tsv", pairs, ("sentence1", "sentence2", "score")), calibration_samples=4)
    model = getattr(sentence_models, make)(tmp_path / "model")
    seen = {word for text in words_of(task.calibration_batches(WANDA, model, None)) for word in text.split()}
    data = task.held_out(100, 4, model)
    found = list(zip(data["sentence1"], data["sentence2"], strict=True))
    assert sorted(found) == sorted((a, b) for a, b, _ in pairs if a not in seen and b not in seen)
    assert 0 < len(found) < 37


def test_queries_are_held_out_with_all_their_documents(tmp_path):
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    from tests.sentence_models import tiny_encoder

    rows = [(f"w{q}", f"w{q} w{30 + d} w9", int(d == 0)) for q in range(9) for d in range(3)]
    task = SentenceTask(table(tmp_path / "x.tsv", rows, ("query", "document", "score")), calibration_samples=5)
    drawn = words_of(task.calibration_batches(WANDA, tiny_encoder(tmp_path / "model"), None))
    seen = {text.split()[0] for text in drawn}  # queries, or the queries of documents
    assert 0 < len(seen) < 9
    assert any(" " in text for text in drawn)
    data = task.held_out(100)
    found = list(zip(data["query"], data["document"], strict=True))
    assert sorted(found) == sorted((query, document) for query, document, _ in rows if query not in seen)
    assert len({query for query, _ in found[:3]}) == 1
    assert len(task.held_out(1)) == 3
    with pytest.raises(DataError, match="has 9 queries, and calibration may see 36: none remains to score"):
        task.held_out(1, 36)


def test_a_polish_leaves_as_many_as_are_to_be_held_out(tmp_path):
    pairs = [(f"w{i % 44} w{i // 44}", f"x{i}", i % 5) for i in range(1000)]
    task = SentenceTask(table(tmp_path / "x.tsv", pairs, ("sentence1", "sentence2", "score")))
    assert task.samples_seen(WANDA[0], 100) == 128
    for reserve, model in ((500, None), (250, CROSS)):
        seen = task.samples_seen(POLISHED, reserve, model)
        assert seen > 128
        assert len(task.held_out(1000, seen, model)) == pytest.approx(reserve, abs=60)
    assert task.samples_seen(POLISHED, 5000) == 128
    examples = ExampleTask("regression", task.source, ("sentence1", "sentence2"), "score")
    assert examples.samples_seen(POLISHED, 700) == 300
    assert examples.samples_seen(WANDA[0], 700) == 128
