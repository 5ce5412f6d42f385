"""hf-prune auto: the split that is reported, what is continued or in the way, and the file with the settings."""

import json

import pytest
import yaml

from hf_prune.cli.main import main
from tests import models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A classifier, and labelled sentences that it answers rightly, in one split."""
    root = tmp_path_factory.mktemp("auto")
    classifier = models.tiny_classifier(seed=4)
    rows = models.answered_sentences(60, 1, classifier)
    lines = [f"{text}\t{label}" for text, label in zip(rows["sentence"], rows["label"], strict=True)]
    (root / "data").mkdir()
    (root / "data" / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    classifier.save_pretrained(root / "model")
    models.tiny_tokenizer().save_pretrained(root / "model")
    return root / "model", root / "data"


@pytest.fixture
def auto(capsys, folders):
    def run(out, *more, drop=100):
        model, data = folders
        arguments = ["auto", model, "--data", data, "--goal", "sparser", "--presets", "fast", "--max-drop", drop]
        arguments += ["--calibration-samples", 8, "--held-out", 24, "--out", out, *more]
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_data_without_another_split_gives_a_card_with_the_held_out_score(auto, tmp_path):
    code, printed, err = auto(tmp_path / "out", "--seed", 3)
    assert code == 0, err
    assert "has no split 'validation': the card gets the score on held-out data" in err
    assert "On a split that had no influence" not in printed
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "# model-sparser" in card
    assert "held out from calibration, but this model was chosen on it" in card
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {point["config"]["seed"] for point in results["points"]} == {3}
    assert yaml.safe_load((tmp_path / "out" / "hf_prune_run.yaml").read_text())["seed"] == 3
    assert "Continuing with" not in err
    assert "Continuing with" in auto(tmp_path / "out", "--seed", 3)[2]


def test_a_split_that_is_asked_for_and_missing_is_refused_before_anything_is_measured(auto, tmp_path):
    code, _, err = auto(tmp_path / "out", "--split", "validation")
    assert code == 1
    assert "no split 'validation'" in err
    assert not (tmp_path / "out").exists()


def test_results_of_something_else_are_neither_continued_nor_replaced(auto, tmp_path):
    (tmp_path / "results.json").write_text('{"mine": 1}')
    for more in ((), ("--restart",)):
        code, _, err = auto(tmp_path, *more)
        assert code == 1
        assert "is not the result of a search" in err
        assert "Continuing with" not in err
    assert (tmp_path / "results.json").read_text() == '{"mine": 1}'


def test_a_search_that_finds_nothing_can_be_repeated_from_its_settings(auto, tmp_path):
    code, printed, _ = auto(tmp_path / "out", drop=1e-9)
    assert code == 1
    assert "Nothing is within 1e-09 points of accuracy" in printed
    assert yaml.safe_load((tmp_path / "out" / "hf_prune_run.yaml").read_text())["command"] == "auto"
