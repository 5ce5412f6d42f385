"""Cards of language models: what the model writes and its benchmarks are shown, counted again, and compared."""

import json
import re

import pytest

from hf_prune import DataError, read_card_data, render_card, verify_checkpoint
from hf_prune.hub.card_data import load_card_data
from hf_prune.hub.card_metadata import read_facts
from tests import models
from tests.evaluation.test_benchmarks import scores
from tests.evaluation.test_generation import lines


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model with its tokenizer, and texts."""
    root = tmp_path_factory.mktemp("language")
    models.tiny_llama().save_pretrained(root / "dense")
    models.tiny_tokenizer().save_pretrained(root / "dense")
    (root / "test.txt").write_text("\n".join(lines(20)))
    return root


@pytest.fixture
def made(folders, tmp_path, run):
    """A pruned model, and what evaluate said of it."""
    run("prune", folders / "dense", "--sparsity", 0.5, "--out", tmp_path / "pruned")
    words = ["evaluate", tmp_path / "pruned", "--against", folders / "dense", "--data", folders / "test.txt"]
    printed = run(*words, "--prompts", 5, "--new-tokens", 6, "--json")
    (tmp_path / "scores.json").write_text(printed)
    return tmp_path


def test_evaluate_prints_what_both_write(folders, tmp_path, run):
    run("prune", folders / "dense", "--sparsity", 0.5, "--out", tmp_path)
    words = ["evaluate", tmp_path, "--against", folders / "dense", "--data", folders / "test.txt", "--window", 12]
    text = run(*words, "--prompts", 4)
    assert text.count("% distinct 4-grams (greedy, ") == 2
    assert "of 12 tokens equal until they part" in text
    assert text.count("\n  prompt: w") == 3
    assert "prompt:" not in run(*words, "--prompts", 0)
    short = tmp_path / "short.txt"
    short.write_text("\n".join("w1 w2 w3 w4 w5" for _ in range(9)))
    words[5] = short
    assert "none of 9 lines makes a prompt" in run(*words, "--prompts", 4, code=1)
    assert "distinct" not in run(*words)


def test_options_of_language_models_are_theirs(folders, tmp_path, run):
    models.save_classifier_and_data(tmp_path, seed=4)
    for option in (["--prompts", 3], ["--new-tokens", 4], ["--lm-eval", "arc_easy"]):
        error = run("evaluate", tmp_path / "dense", "--data", tmp_path / "data", *option, code=1)
        assert f"{option[0]} is for language models, and " in error
    error = run("evaluate", folders / "dense", "--data", folders / "test.txt", "--include-path", "x", code=1)
    assert "--include-path is 'x' without --lm-eval: name its tasks, or leave it out" in error


def test_the_card_shows_what_the_model_writes_and_verify_measures_it_again(folders, made, run):
    values = json.loads((made / "scores.json").read_text())
    run("card", made / "pruned", "--evaluation", made / "scores.json", "--write")
    card = (made / "pruned" / "README.md").read_text()
    comparison = values["generation"]["comparison"]
    assert "## What it writes" in card
    assert f"{comparison['equal_tokens']:.1f} ± " in card
    assert card.count("  * dense: ") == 3
    assert re.search(r"times that of the dense model on the same windows \(95 % interval \d", card)
    claimed = read_facts(card)["score"]["generation"]
    assert claimed["token_f1"] == comparison["token_f1"]
    assert claimed["distinct"] == values["generation"]["evaluation"]["distinct"]
    stored = load_card_data(made / "pruned").evaluation["generation"]
    assert "tokens" not in stored["evaluation"]
    assert "prompts" not in stored["dense"]
    assert verify_checkpoint(str(made / "pruned")).is_right
    again = run("verify", made / "pruned", "--evaluate", "--data", folders / "test.txt")
    assert "generation: distinct" in again
    assert "generation: data_fingerprint" in again
    (made / "other.txt").write_text("\n".join(lines(20, seed=3)))
    assert "DIFFERENT" in run("verify", made / "pruned", "--evaluate", "--data", made / "other.txt", code=1)
    facts = made / "pruned" / "pruning_card.json"
    edited = json.loads(facts.read_text())
    edited["evaluation"]["generation"]["comparison"]["token_f1"] = 0.99
    facts.write_text(json.dumps(edited))
    assert not verify_checkpoint(str(made / "pruned")).is_right


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("evaluation", {"distinct": 0.123}, "distinct is 0.123, and the texts give"),
        ("evaluation", {"n": 4}, "n is 4, and there are 5 texts"),
        ("comparison", {"token_f1": 1.5}, "token_f1 is 1.5"),
        ("comparison", {"equal_tokens": 7}, "equal_tokens is 7"),
        ("comparison", {"dense_distinct": 0.5}, "dense_distinct is 0.5, and the score is"),
        (
            "comparison",
            {"token_f1": 0.99, "identical": 5},
            "and 5 of 5 texts are identical: expected no less than that share",
        ),
        ("comparison", {"distinct_change": 0.7}, "distinct_change is 0.7, and the two shares give"),
        ("comparison", {"interval": [0.8, 0.9]}, "interval is [0.8, 0.9]: expected one around"),
        ("evaluation", {"short": 1}, "short is 1, and 0 texts are too short"),
        ("comparison", {"n": 9}, "the comparison is of 9 prompts and 6 tokens"),
    ],
)
def test_texts_that_cannot_be(made, part, changes, message):
    values = json.loads((made / "scores.json").read_text())
    values["generation"][part].update(changes)
    with pytest.raises(DataError, match=re.escape(message)):
        read_card_data(made / "pruned", evaluation=values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.5}, "ratio is 0.5, and the perplexities give"),
        ({"interval": [7.0, 8.0]}, "interval of the ratio is [7.0, 8.0]: expected one around"),
        ({"dense_perplexity": 2.0}, "dense_perplexity is 2.0, and the score is"),
    ],
)
def test_ratios_of_perplexities_that_cannot_be(made, changes, message):
    values = json.loads((made / "scores.json").read_text())
    values["comparison"].update(changes)
    with pytest.raises(DataError, match=re.escape(message)):
        read_card_data(made / "pruned", evaluation=values)


def test_benchmarks_are_in_the_card(made):
    from hf_prune import compare_benchmarks

    values = json.loads((made / "scores.json").read_text())
    dense, pruned = scores((1, 1, 0, 1)), scores((1, 0, 0, 0))
    compared = compare_benchmarks(dense, pruned).to_dict()
    values["benchmarks"] = {"evaluation": pruned.to_dict(), "dense": dense.to_dict(), "comparison": compared}
    data = read_card_data(made / "pruned", evaluation=values)
    card = render_card(data)
    assert "| t0 | acc | 4 | 0.2500 | 0.7500 | -0.5000 (-1.4187 to +0.4187) |" in card
    assert read_facts(card)["score"]["benchmarks"] == {"t0 acc": 0.25}
    assert "by_example" not in data.to_dict()["evaluation"]["benchmarks"]["dense"]
    values["benchmarks"]["comparison"]["tasks"][0]["change"] = 0.0
    with pytest.raises(DataError, match=r"change at .* is 0.0, and the scores give -0.5"):
        read_card_data(made / "pruned", evaluation=values)
