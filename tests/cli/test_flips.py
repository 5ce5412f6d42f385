"""Changed answers on the command line: as a budget, in tables, and on a card that is measured again."""

import json
import re

import pytest

from hf_prune import verify_checkpoint
from hf_prune.cli.main import main
from tests import models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A classifier, and labelled sentences that it answers rightly, in two splits."""
    root = tmp_path_factory.mktemp("flips")
    classifier = models.tiny_classifier(seed=4)
    (root / "data").mkdir()
    for seed, split in ((1, "train"), (2, "dev")):
        rows = models.answered_sentences(60, seed, classifier)
        lines = [f"{text}\t{label}" for text, label in zip(rows["sentence"], rows["label"], strict=True)]
        (root / "data" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    classifier.save_pretrained(root / "model")
    models.tiny_tokenizer().save_pretrained(root / "model")
    return root / "model", root / "data"


@pytest.fixture
def run(capsys, folders):
    def call(command, *arguments, code=0):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in (command, *arguments, "--data", folders[1])])
        said, err = capsys.readouterr()
        assert int(ended.value.code or 0) == code, err
        return said if code == 0 else said + err

    return call


def test_prune_searches_within_a_share_of_changed_answers(run, folders, tmp_path):
    options = ("--max-flips", 40, "--held-out", 24, "--calibration-samples", 8, "--criterion", "magnitude")
    said = run("prune", folders[0], *options, "--limit", 20, "--out", tmp_path / "out")
    assert "within 40 % of the answers" in said
    search = json.loads((tmp_path / "out" / "sparsity_search.json").read_text())
    assert (search["max_flips"], search["max_drop"]) == (40, None)
    chosen = next(p for p in search["points"] if p["sparsity"] == search["sparsity"])
    assert chosen["comparison"]["divergence"]["flips_upper_bound"] <= 40
    assert chosen["within"] is True
    assert search["reported"]["n"] == 20
    assert "What was counted is right." in run("verify", tmp_path / "out", "--evaluate")  # on as many


def test_the_budgets_of_prune_exclude_each_other(run, folders, tmp_path):
    both = run("prune", folders[0], "--max-flips", 2, "--max-drop", 1, "--out", tmp_path / "out", code=1)
    assert "--max-drop finds the sparsity by measuring, which contradicts --max-flips" in both
    assert "--max-flips finds the sparsity by measuring, which contradicts --dry-run" in run(
        "prune", folders[0], "--max-flips", 2, "--dry-run", code=1
    )
    assert "--limit is of the split that --max-drop and --max-flips report on" in run(
        "prune", folders[0], "--limit", 2, "--out", tmp_path / "out", code=1
    )
    assert not (tmp_path / "out").exists()


def test_a_sweep_shows_how_far_predictions_moved_and_names_the_sweet_spot_by_it(run, folders, tmp_path):
    options = ("--sparsity", "0.05,0.9", "--criterion", "magnitude", "--out", tmp_path / "out")
    said = run("sweep", folders[0], *options, "--max-flips", 50)
    assert "KL ± s.e." in said
    assert "changed ± s.e." in said
    assert re.search(r"Sweet spot: 5 % with magnitude: its measured change is \d+\.\d\d % of the answers", said)
    rows = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert "kl,kl_standard_error,changed,changed_standard_error" in rows[0]
    again = run("sweep", folders[0], *options, "--tolerance", 100)  # from the file, with another tolerance
    assert "its measured drop is" in again
    assert "--max-flips is 0" in run("sweep", folders[0], *options, "--max-flips", 0, code=1)


def test_auto_keeps_what_changes_few_answers(run, folders, tmp_path):
    options = ("--goal", "sparser", "--presets", "fast", "--calibration-samples", 8, "--held-out", 24)
    said = run("auto", folders[0], *options, "--max-flips", 99, "--out", tmp_path / "out")
    assert "lost in % of answers changed" in said
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (values["max_drop"], values["unit"]) == (99, "% of answers changed")
    assert "a search of other settings" in run(
        "auto", folders[0], *options, "--max-drop", 99, "--out", tmp_path / "out", code=1
    )


def test_a_card_says_how_far_predictions_moved_and_verify_measures_it_again(run, folders, tmp_path, capsys):
    model, out, scores = folders[0], tmp_path / "out", tmp_path / "scores.json"
    run("prune", model, "--sparsity", 0.5, "--criterion", "magnitude", "--out", out)
    scores.write_text(run("evaluate", out, "--against", model, "--json"))
    moved = json.loads(scores.read_text())["comparison"]["divergence"]
    with pytest.raises(SystemExit):
        main(["card", str(out), "--evaluation", str(scores), "--write"])
    card = (out / "README.md").read_text()
    assert f"{moved['flips']:.2f} % ± {moved['flips_standard_error']:.2f} of the answers changed" in " ".join(
        card.split()
    )
    facts = json.loads((out / "pruning_card.json").read_text())
    assert "distributions" not in facts["evaluation"]["evaluation"]
    assert facts["evaluation"]["comparison"]["divergence"] == moved
    ways = ("scores (add --evaluate)", "how far predictions moved (add --evaluate --against MODEL)")
    for options, measured in (((), ()), (("--evaluate",), ways[:1]), (("--evaluate", "--against", model), ways)):
        said = run("verify", out, *options) if options else str(verify_checkpoint(str(out)))
        claims = said.partition("Not counted")[2]
        assert "the score of the dense model" in claims
        assert [way in claims for way in ways] == [way not in measured for way in ways]
    assert "kl of the divergence" in said
    assert "--against is the dense model" in run("verify", out, "--against", model, code=1)
    other = tmp_path / "other"  # whose predictions are further away
    models.tiny_classifier(seed=5).save_pretrained(other)
    models.tiny_tokenizer().save_pretrained(other)
    assert "DIFFERENT" in run("verify", out, "--evaluate", "--against", other, code=1)
    edited = re.sub(r"(divergence:\n(?:.*\n)*?.*kl: )[\d.e-]+", r"\g<1>0.5", card, count=1)
    assert edited != card
    (out / "README.md").write_text(edited)
    assert "divergence" in run("verify", out, code=1)
