"""The card that prune and train write beside a checkpoint: what was measured, and nothing else."""

import json

import pytest
import torch

from hf_prune import PruningConfig, verify_checkpoint
from hf_prune.cli.main import main
from hf_prune.cli.run_file import shown_command
from hf_prune.cli.workflows.prune import prune_checkpoint
from tests import models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("cards")
    model, tokenizer = models.tiny_classifier().eval(), models.tiny_tokenizer()
    with torch.no_grad():
        logits = model(**tokenizer(models.tiny_sentences(60, 1)["sentence"], padding=True, return_tensors="pt")).logits
        model.classifier.bias[0] += (logits[:, 1] - logits[:, 0]).median()  # both classes occur
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "data").mkdir()
    for split, n, seed in (("train", 60, 1), ("dev", 24, 0)):
        texts = models.tiny_sentences(n, seed)["sentence"]
        with torch.no_grad():  # labelled by the model, which is then right
            labels = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(-1).tolist()
        lines = [f"{text}\t{label}" for text, label in zip(texts, labels, strict=True)]
        (root / "data" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return root


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert not ended.value.code


def facts(folder):
    return json.loads((folder / "pruning_card.json").read_text())


def test_a_pruning_without_data_has_sizes_and_no_scores(folders, tmp_path):
    run("prune", folders / "model", "--sparsity", 0.5, "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**50 % of the pruned weights are zero**" in card
    assert "Nothing was timed" in card
    assert "What it costs" not in card
    assert "samples of" not in card
    assert verify_checkpoint(tmp_path / "out").is_right


@pytest.mark.parametrize("command", ["prune", "train"])
def test_what_was_measured_and_learned_from_is_on_it(command, folders, tmp_path):
    out, data = tmp_path / "out", folders / "data"
    if command == "train":
        options = ["--sparsity", 0.5, "--batch-size", 8]
    else:
        options = ["--max-drop", 90, "--held-out", 20, "--split", "dev", "--criterion", "wanda"]
        options += ["--calibration-samples", 8]
    run(command, folders / "model", *options, "--data", data, "--out", out)
    card, found = (out / "README.md").read_text(), facts(out)
    assert f"| this model | {100 * found['evaluation']['evaluation']['accuracy']:.2f} %" in card
    assert found["evaluation"]["evaluation"]["n"] == 24
    assert found["calibration"] == f"up to {512 if command == 'train' else 8} samples of data, train"
    assert found["base_model"] is None  # a folder is no name that others know
    assert verify_checkpoint(out).is_right


def test_the_text_of_an_author_is_kept_and_a_card_that_cannot_be_read_too(folders, tmp_path):
    out = tmp_path / "out"
    prune_checkpoint(str(folders / "model"), PruningConfig(0.5), out, command="hf-prune prune x")
    assert facts(out)["command"] == "hf-prune prune x"
    card = out / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    prune_checkpoint(str(folders / "model"), PruningConfig(0.7), out, overwrite=True)
    assert "My own words." in card.read_text()
    assert "**70 % of the pruned" in card.read_text()
    card.write_text("---\na: [\n---\nMine.\n")
    with pytest.warns(UserWarning, match=r"no card was written .*not valid YAML"):
        prune_checkpoint(str(folders / "model"), PruningConfig(0.6), out, overwrite=True)
    assert card.read_text() == "---\na: [\n---\nMine.\n"
    assert json.loads((out / "sparsity_report.json").read_text())["target_sparsity"] == pytest.approx(0.6, abs=0.01)
    card.unlink()
    (tmp_path / "secret").write_text("secret")
    card.symlink_to(tmp_path / "secret")
    with pytest.warns(UserWarning, match=r"no card was written .*links to a file outside"):
        prune_checkpoint(str(folders / "model"), PruningConfig(0.6), out, overwrite=True)
    assert card.is_symlink()
    assert not (out / "pruning_card.json").exists()  # the old facts are not true of the new weights


def test_a_card_that_cannot_be_written_is_warned_of_by_the_name_of_the_folder(folders, tmp_path, monkeypatch):
    def fail(folder, *_, **__):
        raise PermissionError(13, "Permission denied", str(folder / "README.md"))

    monkeypatch.setattr("hf_prune.cli.workflows.card.read_card_data", fail)
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match="no card was written") as said:
        prune_checkpoint(str(folders / "model"), PruningConfig(0.6), out)
    message = next(str(w.message) for w in said if "no card was written" in str(w.message))
    assert f"Permission denied: '{out / 'README.md'}'" in message
    assert (out / "model.safetensors").exists()


def test_a_token_is_not_on_a_card():
    words = ["auto", "a b", "--token", "hf_secret", "--out", "x", "--token=hf_other"]
    assert shown_command(words) == "hf-prune auto 'a b' --out x"
