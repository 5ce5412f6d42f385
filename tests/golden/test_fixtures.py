"""What earlier versions wrote is read by this one, bit for bit: see ``write_fixtures``."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_prune
from hf_prune import (
    AutoPrunedModelForCausalLM,
    AutoPrunedModelForSequenceClassification,
    CheckpointError,
    PruningConfig,
    decompress_checkpoint,
    import_hook,
    prunable,
    read_card_data,
    render_card,
    verify_checkpoint,
)
from tests.golden import write_fixtures
from tests.golden.cases import TOLERANCE, run_command
from tests.golden.record import differences, of_masks, of_weights
from tests.golden.write_fixtures import CONFIGS, EXPECTED, FOLDER, MODIFIED, tensors_of

WRITTEN = json.loads(EXPECTED.read_text())
CHECKPOINTS = [name for name in WRITTEN if (FOLDER / name / "config.json").is_file()]
PACKED = [name for name in CHECKPOINTS if name.startswith("packed") or name == "remote-code"]
pytestmark = pytest.mark.filterwarnings("ignore")


def classes(name):
    causal = "bf16" in name
    return (
        AutoPrunedModelForCausalLM if causal else AutoPrunedModelForSequenceClassification,
        AutoModelForCausalLM if causal else AutoModelForSequenceClassification,
    )


def without_masks(found):
    return {key: found[key] for key in ("bits", "zeros")}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_have_the_same_bits_and_masks(name):
    ours, theirs = classes(name)
    model = ours.from_pretrained(FOLDER / name)
    assert tensors_of(model) == WRITTEN[name]
    assert without_masks(tensors_of(theirs.from_pretrained(FOLDER / name))) == without_masks(WRITTEN[name])
    assert bool(model.masks) == ("shrunk" not in name)


@pytest.mark.parametrize("name", PACKED)
def test_packed_checkpoints_are_unpacked(name, tmp_path):
    decompress_checkpoint(FOLDER / name, tmp_path / "out")
    assert tensors_of(classes(name)[0].from_pretrained(tmp_path / "out")) == WRITTEN[name]


NO_HF_PRUNE = """
import sys
sys.modules["hf_prune"] = None  # cannot be imported
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model.state_dict(), sys.argv[2])
"""


def test_remote_code_of_then_still_loads(tmp_path, fresh_process):
    done = fresh_process.run(NO_HF_PRUNE, FOLDER / "remote-code", tmp_path / "state.pt")
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "state.pt")
    expected = AutoModelForSequenceClassification.from_pretrained(FOLDER / "plain").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_pickled_model_comes_back_with_its_masks():
    model = pickle.loads((FOLDER / "pruned.pickle").read_bytes())
    assert tensors_of(model) == WRITTEN["pruned.pickle"]
    assert model.prune(0.6).sparsity_report().target_sparsity == pytest.approx(0.6, abs=0.01)


def test_a_card_is_right_and_rendered_the_same(tmp_path):
    folder = shutil.copytree(FOLDER / "plain", tmp_path / "plain")
    text = (folder / "README.md").read_text()
    assert render_card(read_card_data(folder), text) == text
    result = verify_checkpoint(str(folder))
    assert result.is_right, str(result)
    run_command("verify", folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert not verify_checkpoint(str(folder)).is_right


def test_settings_are_read_and_written_the_same():
    texts = json.loads((FOLDER / "pruning_configs.json").read_text())
    configs = [PruningConfig(**settings) for settings in CONFIGS]
    assert [PruningConfig.from_json(text) for text in texts] == configs
    assert [config.to_json() for config in configs] == texts


def test_a_sweep_goes_on_from_its_results(tmp_path):
    folder = shutil.copytree(FOLDER / "sweep", tmp_path / "sweep")
    result = write_fixtures.sweep(folder)
    assert [point.prune_seconds for point in result.points] == WRITTEN["sweep"]["seconds"]  # not measured again
    assert str(result) == WRITTEN["sweep"]["told"]


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A stream that was interrupted, as if it had run here and by this version."""
    source = shutil.copytree(FOLDER / "stream" / "source", tmp_path / "source")
    shutil.copytree(FOLDER / "stream" / "partial", tmp_path / ".out.partial")
    for path in source.iterdir():
        os.utime(path, (MODIFIED, MODIFIED))
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    first, *rest = journal.read_bytes().splitlines(keepends=True)
    key = json.loads(first.rpartition(b" ")[0]) | {"path": str(source), "version": hf_prune.__version__}
    line = json.dumps(key).encode()
    journal.write_bytes(b"".join([line, b" %08x\n" % zlib.crc32(line), *rest]))
    return source


def test_an_interrupted_stream_is_finished(interrupted, tmp_path):
    staged = tmp_path / ".out.partial" / "checkpoint" / "model.safetensors"
    inode = staged.stat().st_ino
    write_fixtures.stream(interrupted, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino == inode  # not begun anew
    model = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert tensors_of(model) == WRITTEN["stream"]


def test_an_interrupted_stream_stands_in_the_way_of_another(interrupted, tmp_path):
    with pytest.raises(CheckpointError, match="unfinished result of another run, which differs in settings"):
        hf_prune.prune_stream(interrupted, 0.6, tmp_path / "out")


def test_a_training_is_resumed(tmp_path):
    shutil.copytree(FOLDER / "training", tmp_path, dirs_exist_ok=True)
    trainer = write_fixtures.training(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    model = prunable(trainer.model)
    found = {**of_masks(model.masks), **of_weights(model.state_dict())}
    assert list(differences(WRITTEN["training"], found, TOLERANCE)) == []


@pytest.mark.parametrize(
    "name", ["polish.PolishRecord", "speed.SpeedRecord", "bypass._hand_on", "schedules.Schedule", "masking.MaskStore"]
)
def test_pickles_find_moved_classes_by_their_former_names(name):
    module, _, attribute = name.rpartition(".")
    found = pickle.loads(f"chf_prune.{module}\n{attribute}\n.".encode())
    assert found.__name__ == attribute


@pytest.mark.parametrize("module", sorted(import_hook._MOVED_CLASSES))
def test_pickles_find_results_by_their_former_names(module):
    for name, now in import_hook._MOVED_CLASSES[module].items():
        found = pickle.loads(f"chf_prune.{module}\n{name}\n.".encode())
        assert f"{found.__module__}.{found.__qualname__}" == f"hf_prune.{now}"
    with pytest.raises(AttributeError):
        pickle.loads(f"chf_prune.{module}\nNothing\n.".encode())
