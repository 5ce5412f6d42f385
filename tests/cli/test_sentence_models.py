"""Folders of sentence-transformers on the command line: pruned, scored, swept, compressed, reported."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hf_prune.cli.main import main
from tests import models

pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
from sentence_transformers import CrossEncoder, SentenceTransformer

from hf_prune import prunable, sentence_batches
from tests.sentence_models import pairs, texts, tiny_cross_encoder, tiny_encoder

SCORED = "sentence1\tsentence2\tscore"
SEARCHED = "query\tdocument\tscore"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("sentences")
    encoder = tiny_encoder(root / "bert", prompts={"query": "w1 w2 ", "document": "w3 "})
    encoder.save(str(root / "encoder"))
    tiny_cross_encoder(root / "cross-base").save(str(root / "cross"))
    rng = random.Random(0)
    for name in ("similar", "searched"):
        (root / name).mkdir()
    for seed, split in ((1, "train"), (2, "dev")):
        rows = [f"{a}\t{b}\t{rng.random():.3f}" for a, b in pairs(40, seed)]
        (root / "similar" / f"{split}.tsv").write_text("\n".join([SCORED, *rows]) + "\n")
        found = [f"w{i // 4} w{i // 4 + 1}\t{text}\t{2 * (i % 4 == 0)}" for i, text in enumerate(texts(40, seed + 7))]
        (root / "searched" / f"{split}.tsv").write_text("\n".join([SEARCHED, *found]) + "\n")
    (root / "train.txt").write_text("\n".join(texts(30, 5)))
    models.tiny_bert_mlm().save_pretrained(root / "plain")
    models.tiny_tokenizer().save_pretrained(root / "plain")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture
def hf_prune(capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-prune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def opened(name: str, folder: object):
    cls = CrossEncoder if name == "cross" else SentenceTransformer
    return cls(str(folder), device="cpu", local_files_only=True)


def answers(model):
    return model.predict(pairs(6, 9)) if isinstance(model, CrossEncoder) else model.encode(texts(6, 9))


@pytest.mark.parametrize("name", ["encoder", "cross"])
@pytest.mark.parametrize("data", ["similar", "searched"])
def test_pruned_on_texts_and_loaded_by_the_plain_class(name, data, folders, hf_prune, tmp_path):
    out = tmp_path / "out"
    code, said, _ = hf_prune(
        "prune", folders[name], "--sparsity", 0.5, "--criterion", "wanda", "--data", folders[data], "--out", out
    )
    assert code == 0
    assert f"Saved:   {out} (" in said
    pruned, dense = opened(name, out), opened(name, folders[name])
    assert not np.array_equal(answers(pruned), answers(dense))
    assert [type(module).__name__ for module in pruned] == [type(module).__name__ for module in dense]
    assert pruned.prompts == dense.prompts
    again = prunable(type(dense))(str(out), device="cpu", local_files_only=True)
    assert again.masks
    code, said, _ = hf_prune("report", out)
    assert code == 0
    assert "50.00 %" in said


def test_calibration_reads_texts_as_the_model_does(folders, hf_prune, tmp_path):
    """A file of as many lines as samples: order does not matter, since sums over tokens are compared."""
    options = ("--sparsity", 0.5, "--criterion", "wanda", "--scope", "row", "--calibration-samples", 30)
    code, _, _ = hf_prune(
        "prune", folders["encoder"], *options, "--data", folders["train.txt"], "--out", tmp_path / "a"
    )
    assert code == 0
    expected = prunable(opened("encoder", folders["encoder"]))
    lines = list(dict.fromkeys(Path(folders["train.txt"]).read_text().splitlines()))
    batches = sentence_batches(lines, expected, batch_size=16)
    expected.prune(0.5, criterion="wanda", scope="row", calibration=batches)
    found = prunable(SentenceTransformer)(str(tmp_path / "a"), device="cpu", local_files_only=True)
    total = sum(mask.numel() for mask in expected.masks.values())
    same = sum(int((found.masks[name] == mask).sum()) for name, mask in expected.masks.items())
    assert same >= 0.999 * total


def test_units_removed_compressed_and_scored(folders, hf_prune, tmp_path):
    out, small = tmp_path / "out", tmp_path / "small"
    options = ("--sparsity", 0.3, "--granularity", "head,neuron", "--criterion", "fisher", "--data", folders["similar"])
    code, said, err = hf_prune("prune", folders["encoder"], *options, "--out", out)
    assert code == 0, err
    code, _, err = hf_prune("compress", out, small)
    assert code == 0, err
    assert np.array_equal(answers(opened("encoder", out)), answers(opened("encoder", small)))
    smaller = opened("encoder", small).transformers_model.num_parameters()
    assert smaller < opened("encoder", folders["encoder"]).transformers_model.num_parameters()
    code, said, err = hf_prune("evaluate", small, "--against", folders["encoder"], "--data", folders["similar"])
    assert code == 0, err
    assert "Spearman" in said
    assert "paired, n = 40)" in said
    code, said, err = hf_prune("bench", folders["encoder"], small, "--length", 8, "--rounds", 2, "--warmup", 1)
    assert code == 0, err


@pytest.mark.parametrize("name", ["encoder", "cross"])
def test_scored_as_json(name, folders, hf_prune):
    code, said, err = hf_prune("evaluate", folders[name], "--data", folders["searched"], "--json")
    assert code == 0, err
    score = json.loads(said)["evaluation"]
    assert (score["metric"], score["n"], score["split"]) == ("nDCG@10", 10, "validation")
    code, said, err = hf_prune(
        "evaluate", folders[name], "--data", folders["searched"], "--metric", "spearman", "--json"
    )
    assert json.loads(said)["evaluation"]["metric"] == "Spearman"


def test_a_sweep_continues(folders, hf_prune, tmp_path):
    out = tmp_path / "sweep"
    arguments = (
        "sweep",
        folders["encoder"],
        "--data",
        folders["searched"],
        "--criterion",
        "magnitude,wanda",
        "--out",
        out,
    )
    code, said, err = hf_prune(*arguments, "--sparsity", "0.5")
    assert code == 0, err
    assert "nDCG@10" in said
    assert (out / "results.csv").read_text().startswith("criterion,sparsity,model_sparsity,remaining,nDCG@10,")
    first = json.loads((out / "results.json").read_text())
    code, _, err = hf_prune(*arguments, "--sparsity", "0.5,0.9")
    assert code == 0, err
    second = json.loads((out / "results.json").read_text())
    assert [p["sparsity"] for p in second["points"]] == [0.5, 0.9, 0.5, 0.9]
    assert first["points"][0] == second["points"][0]
    second["dense"]["values"][0] += 0.25
    (out / "results.json").write_text(json.dumps(second))
    code, _, err = hf_prune(*arguments, "--sparsity", "0.5")
    assert code != 0
    assert "the file was edited" in err


@pytest.mark.filterwarnings("ignore:the dense model has Spearman")
def test_a_sweep_of_pairs_knows_their_scores(folders, hf_prune, tmp_path):
    out = tmp_path / "sweep"
    arguments = ("sweep", folders["cross"], "--data", folders["similar"], "--sparsity", "0.5", "--out", out)
    assert hf_prune(*arguments)[0] == 0
    assert hf_prune(*arguments)[0] == 0
    values = json.loads((out / "results.json").read_text())
    values["dense"]["references"][0] += 1
    (out / "results.json").write_text(json.dumps(values))
    code, _, err = hf_prune(*arguments)
    assert code != 0
    assert "value is" in err or "has other labels than the data" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("evaluate", "plain", "--data", "similar", "--metric", "ndcg"),
            "without modules.json: expected a model",
        ),
        (("evaluate", "encoder", "--against", "plain", "--data", "similar"), "expected two of the same kind"),
        (("evaluate", "encoder", "--data", "similar", "--window", "8"), "--window is for language"),
        (
            ("evaluate", "encoder", "--data", "similar", "--metric", "bleu"),
            "metric is 'bleu': expected one of",
        ),
        (("evaluate", "encoder", "--data", "train.txt"), "is not a table"),
        (
            ("prune", "encoder", "--criterion", "taylor", "--data", "similar"),
            "criterion 'taylor' needs labels",
        ),
        (("prune", "cross", "--criterion", "wanda", "--data", "train.txt"), "expected two columns|is not a table"),
        (
            ("prune", "encoder", "--stream", "--criterion", "wanda", "--scope", "row", "--data", "similar"),
            "--stream does n",
        ),
        (("prune", "encoder", "--max-drop", "1", "--data", "similar"), "expected a …ForSequenceClassification"),
        (("train", "encoder", "--data", "similar", "--sparsity", "0.5"), "expected a …ForSequenceClassification"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(arguments, message, folders, hf_prune, tmp_path):
    named = [folders.get(word, word) for word in arguments]
    out = () if arguments[0] == "evaluate" else ("--out", tmp_path / "out")
    code, _, err = hf_prune(*named, *out)
    assert code != 0
    assert any(part in " ".join(err.split()) for part in message.split("|"))
    assert not (tmp_path / "out").exists()


def test_an_early_folder_is_refused_with_what_to_do(folders, hf_prune, tmp_path):
    old = tmp_path / "old"
    (old / "0_Transformer").mkdir(parents=True)
    (old / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "0_Transformer", "type": "x"}]))
    code, _, err = hf_prune("prune", old, "--sparsity", 0.5, "--out", tmp_path / "out")
    assert code != 0
    assert "whose weights are in '0_Transformer', as early versions" in " ".join(err.split())


def test_heads_that_the_library_does_not_load_are_not_made_up(folders, hf_prune, tmp_path):
    """all-mpnet-base-v2 names a class with a head for masked tokens, whose weights are not in its files."""
    source = tmp_path / "source"
    opened("encoder", folders["encoder"]).save(str(source))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    assert hf_prune("prune", source, "--sparsity", 0.5, "--out", tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertModel"]
    assert np.array_equal(answers(opened("encoder", tmp_path / "out")), answers(opened("encoder", tmp_path / "out")))


def test_without_the_library_weights_are_pruned_and_texts_refused(folders, hf_prune, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert hf_prune("prune", folders["encoder"], "--sparsity", 0.5, "--out", tmp_path / "out")[0] == 0
    code, _, err = hf_prune("evaluate", folders["encoder"], "--data", folders["similar"])
    assert code != 0
    assert "is a SentenceTransformer of sentence-transformers, which is not installed" in " ".join(err.split())


@pytest.mark.parametrize("limit", [(), ("--limit", 18)])  # not the whole of the last query
@pytest.mark.parametrize(("data", "metric"), [("similar", "Spearman"), ("searched", "nDCG@10")])
def test_a_card_shows_the_score_and_is_verified_by_scoring_again(data, metric, limit, folders, hf_prune, tmp_path):
    out, scores = tmp_path / "out", tmp_path / "scores.json"
    hf_prune("prune", folders["encoder"], "--sparsity", 0.5, "--out", out)
    scored = ("evaluate", out, "--against", folders["encoder"], "--data", folders[data], *limit)
    _, said, _ = hf_prune(*scored, "--json")
    scores.write_text(said)
    report, value = said, json.loads(said)["evaluation"]["value"]
    code, _, err = hf_prune("card", out, "--evaluation", scores, "--dataset", f"org/{data}", "--write")
    assert code == 0, err
    card = (out / "README.md").read_text()
    assert f"| this model | {value:.4f} ± " in card
    assert f"type: {metric.lower()}" in card
    assert "paired p = " in card
    assert "library_name: sentence-transformers\npipeline_tag: sentence-similarity" in card
    assert 'from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("out")' in card
    code, said, err = hf_prune("verify", out, "--evaluate", "--data", folders[data])
    assert code == 0, said + err
    (out / "README.md").write_text(card.replace(f"value: {value!r}", "value: 0.987"))
    code, said, _ = hf_prune("verify", out, "--evaluate", "--data", folders[data])
    assert code == 1
    claimed = json.loads(scores.read_text())
    claimed["evaluation"]["value"] = 0.987
    scores.write_text(json.dumps(claimed))
    code, _, err = hf_prune("card", out, "--evaluation", scores)
    assert code == 1
    assert "value is 0.987" in err
    claimed = json.loads(report)
    claimed["evaluation"] |= {"n_rows": 2, "values": None, "references": None}
    scores.write_text(json.dumps(claimed))
    code, _, err = hf_prune("card", out, "--evaluation", scores)
    assert code == 1
    assert "n_rows is 2: expected a whole number, at least n" in err
