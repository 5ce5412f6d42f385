"""A card goes with its checkpoint: compressed or decompressed, it says what is true of the new files, or nothing."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import RepoCard
from safetensors.torch import load_file, save_file

from hf_prune import compress_checkpoint, decompress_checkpoint, read_card_data, verify_checkpoint, write_card
from hf_prune.hub.card_metadata import read_facts
from hf_prune.hub.card_surroundings import BEGIN, END
from hf_prune.hub.checksums import checksums, weights_digest
from tests import models
from tests.support.command_line import exit_code

SCORE = {"accuracy": 0.7, "standard_error": 0.07, "n": 40, "split": "validation", "data_fingerprint": "f"}
SCORES = {"evaluation": SCORE}
POINT = {"model": "pruned", "batch_size": 1, "length": 8, "median": 0.0123}
LATENCY = {"points": [POINT], "rounds": 3, "threads": 1, "dtype": "float32", "device": "cpu", "torch": "2"}
FACTS = {"base_model": "me/base", "license": "mit", "dataset": "me/data", "command": "hf-prune prune a <b>"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pruned checkpoint with a card that has all there can be, and the author's own words around it."""
    root = tmp_path_factory.mktemp("renewal")
    models.save_classifier_and_data(root, seed=4)
    command(["prune", root / "dense", "--sparsity", "0.6", "--out", root / "pruned", "--plots"])
    (root / "pruned" / "README.md").write_text("---\nlanguage: en\n---\n\n# Mine\n\nBefore.\n")
    weights = weights_digest(checksums(root / "pruned"))
    names = {point["model"]: weights for point in LATENCY["points"]}
    measured = {"evaluation": {**SCORES, "weights": weights}, "latency": {**LATENCY, "weights": names}}
    write_card(root / "pruned", read_card_data(root / "pruned", **FACTS, **measured))
    card = root / "pruned" / "README.md"
    card.write_text(card.read_text() + "\nAfter.\n")
    return root


def command(words):
    assert exit_code(*words) == 0


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made / "pruned", tmp_path / "pruned")


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def card_of(folder):
    return (folder / "README.md").read_text()


def test_same_values_keep_what_was_measured_and_describe_the_new_files(folder, tmp_path):
    report = compress_checkpoint(folder, tmp_path / "small")
    assert str(report).endswith("bit for bit the same\nREADME.md describes the new files.")
    old, new = card_of(folder), card_of(tmp_path / "small")
    assert verify_checkpoint(str(tmp_path / "small")).is_right
    assert read_facts(new)["score"] == read_facts(old)["score"]
    assert "score" in read_facts(new)
    assert front(new)["model-index"][0]["results"] == front(old)["model-index"][0]["results"]
    assert (front(new)["base_model"], front(new)["license"], front(new)["language"]) == ("me/base", "mit", "en")
    for kept in ("70.00 % ± 7.00", "12.3 ms", "hf-prune prune a &lt;b&gt;", "Before.", "After.", "[me/base]("):
        assert kept in new
    assert 'from_pretrained("small")' in new
    assert "import hf_prune" in new
    assert f"| this model | {read_facts(new)['parameters']:,} |" in new
    headings = [line for line in new.splitlines() if line.startswith("## ")]
    assert headings == [line for line in old.splitlines() if line.startswith("## ")]
    report = decompress_checkpoint(tmp_path / "small", tmp_path / "again" / "pruned")
    assert report.card == "README.md describes the new files."
    again = card_of(tmp_path / "again" / "pruned").splitlines()
    different = [line for line, other in zip(again, old.splitlines(), strict=True) if line != other]
    changing = ("model.safetensors:", "config.json:", "pruning_masks.safetensors:", "text:", "| this model |")
    assert all(line.strip().startswith(changing) for line in different)


def test_after_rounding_everything_is_counted_anew(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    kept = weights["classifier.weight"].nonzero()[0]
    weights["classifier.weight"][tuple(kept)] = 1e-6  # will be rounded to zero
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_card(folder, read_card_data(folder, **FACTS, evaluation=SCORES, latency=LATENCY))
    small = tmp_path / "small"
    report = compress_checkpoint(folder, small, values="int8")
    assert "The part of README.md that hf_prune wrote was removed: hf-prune card FOLDER --write counts again." in str(
        report
    )
    assert set(report.left) == {"layers.png", "weights.png", "sparsity_report.json", "pruning_card.json"}
    assert not any((small / name).exists() for name in report.left)
    assert RepoCard(card_of(small)).text.strip() == "# Mine\n\nBefore.\n\nAfter."
    assert "model-index" not in front(card_of(small))
    command(["card", small, "--write"])
    new = card_of(small)
    assert not any(gone in new for gone in ("70.00", "12.3 ms", ".png"))
    assert "were rounded to int8, which is lossy." in new
    assert verify_checkpoint(str(small)).is_right  # zeros that rounding made are counted
    counts = [json.loads((f / "sparsity_report.json").read_text())["nonzero"] for f in (folder, small)]
    assert counts[0] - counts[1] == 1
    decompress_checkpoint(small, tmp_path / "again")
    assert "were rounded to int8, which is lossy." in card_of(tmp_path / "again")
    assert verify_checkpoint(str(tmp_path / "again")).is_right


@pytest.mark.parametrize("values", ["exact", "int8"])
def test_a_card_of_other_weights_is_taken_out(folder, tmp_path, values):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = compress_checkpoint(folder, tmp_path / "small", values=values)
    assert "The part of README.md that hf_prune wrote was removed" in str(found)
    assert read_facts(card_of(tmp_path / "small")) == {}
    assert not (tmp_path / "small" / "pruning_card.json").exists()


@pytest.mark.parametrize(
    "text", ["mine\r\n", "---\n- x\n---\n", "---\na: [\n---\n", "\N{BOM}---\ntags: [a]\n---\n# A\n"]
)
def test_a_card_that_is_the_authors_alone_is_copied(folder, tmp_path, text):
    (folder / "README.md").write_bytes(text.encode())
    assert compress_checkpoint(folder, tmp_path / "small").card == ""
    assert (tmp_path / "small" / "README.md").read_bytes() == text.encode()


def test_a_card_with_damaged_metadata_is_copied_and_said_so(folder, tmp_path):
    text = f"---\na: [\n---\n{BEGIN}\nold\n{END}\n"
    (folder / "README.md").write_text(text)
    assert "is not valid YAML" in str(compress_checkpoint(folder, tmp_path / "small"))
    assert card_of(tmp_path / "small") == text


def test_the_command_says_what_became_of_the_card(folder, tmp_path, capsys):
    command(["compress", folder, tmp_path / "small", "--values", "int8"])
    said = capsys.readouterr().out
    assert "counts again.\nNot copied: sparsity_report.json, layers.png, weights.png, pruning_card.json." in said
