"""Streaming against loading, pruning and saving; interruptions; errors; memory."""

from __future__ import annotations

import errno
import filecmp
import itertools
import json
import os
import shutil
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_prune import (
    AutoPrunedModelForSequenceClassification,
    CalibrationError,
    CheckpointError,
    ConfigError,
    DataError,
    PlanError,
    PruningConfig,
    plan_stream,
    prune_stream,
    text_batches,
)
from hf_prune.auto import load_native
from hf_prune.checkpoint import files as checkpoints
from hf_prune.checkpoint import mask_file as mask_file_module
from hf_prune.cli.workflows.stream import stream_checkpoint
from hf_prune.conversion.streaming import blocks as stream_blocks
from hf_prune.conversion.streaming import meta_model, placing, streamable
from hf_prune.conversion.streaming import output as stream_output
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.evaluation.data.loading import load_texts
from hf_prune.utils import staging as staging_module
from hf_prune.utils.folders import MARK, RUN_FILE
from tests import models

SHARED = os.environ.get("HF_PRUNE_SHARED")
BUILDERS = {**models.TRANSFORMERS, "vit": models.tiny_vit, "moe": models.tiny_moe}
BUILDERS |= {"bart": models.tiny_bart, "marian": models.tiny_marian}
DATA_FREE = {
    "layer": {"sparsity": 0.5},
    "row": {"sparsity": 0.37, "scope": "row"},
    "global": {"sparsity": 0.6, "scope": "global"},
    "random, erk": {"criterion": "random", "allocation": "erk", "seed": 3},
    "2:4": {"granularity": "2:4"},
    "global random": {"criterion": "random", "scope": "global"},
}
CALIBRATED = {
    "wanda": {"criterion": "wanda", "scope": "row"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "alps": {"criterion": "alps", "sparsity": 0.7},
    "repair": {"repair": "least_squares", "sparsity": 0.6},
}
SMALL_SHARDS = "5KB"


def saved(model: Any, folder: Path, max_shard_size: str = SMALL_SHARDS) -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def batches_for(config: PruningConfig, model: nn.Module) -> list[dict] | None:
    return models.tiny_batches(model) if config.needs else None


def pruned_in_memory(source: Path, config: PruningConfig, out: Path, batches: Any) -> tuple[Any, Any]:
    """The other way: the model with its masks, and the report, saved in a folder."""
    model = load_native(str(source))
    dense = model.sparsity_report(config)
    model.prune(config, calibration=batches).save_pretrained(out)
    return model, model.sparsity_report().with_before(dense)


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the settings of a run, which name the folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != RUN_FILE]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def nothing_hidden(folder: Path) -> bool:
    return not [path.name for path in folder.iterdir() if path.name.startswith(".")]


# --- the same as in memory --------------------------------------------------------------------------


def pairs(settings: dict[str, dict[str, Any]], *thorough: str) -> list[Any]:
    """Each kind of model with one of the settings in turn, and the thorough kinds with all (``make test-rest``)."""
    in_turn = list(zip(BUILDERS, itertools.cycle(settings)))
    rest = [pair for pair in itertools.product(thorough, settings) if pair not in in_turn]
    return [
        pytest.param(
            kind, settings[name], id=f"{kind}-{name}", marks=() if number < len(in_turn) else pytest.mark.matrix
        )
        for number, (kind, name) in enumerate([*in_turn, *rest])
    ]


@pytest.mark.parametrize(("kind", "settings"), pairs(DATA_FREE, "llama", "bart"))
def test_without_data_everything_is_bit_equal(kind, settings, tmp_path):
    source, config = saved(BUILDERS[kind](), tmp_path / "source"), PruningConfig(**settings)
    expected, expected_report = pruned_in_memory(source, config, tmp_path / "expected", None)
    report = prune_stream(source, config, tmp_path / "out")
    assert report == expected_report
    assert filecmp.cmp(tmp_path / "expected" / checkpoints.MASK_FILE, tmp_path / "out" / checkpoints.MASK_FILE, False)
    found = load_native(str(tmp_path / "out"))
    assert found.masks.keys() == expected.masks.keys()
    assert models.snapshot(found).keys() == models.snapshot(expected).keys()
    models.assert_unchanged(found, models.snapshot(expected))
    assert nothing_hidden(tmp_path)


@pytest.mark.filterwarnings("ignore:.*are experts that saw fewer")  # so few tokens are all that a test has time for
@pytest.mark.parametrize(("kind", "settings"), pairs(CALIBRATED, "llama", "bart"))
def test_calibrated_masks_are_bit_equal(kind, settings, tmp_path):
    model = BUILDERS[kind]()
    source, config = saved(model, tmp_path / "source"), PruningConfig(**settings)
    batches = models.tiny_batches(model)
    expected, _ = pruned_in_memory(source, config, tmp_path / "expected", batches)
    report = prune_stream(source, config, tmp_path / "out", calibration=batches, cache_bytes=0)
    assert filecmp.cmp(tmp_path / "expected" / checkpoints.MASK_FILE, tmp_path / "out" / checkpoints.MASK_FILE, False)
    found = load_native(str(tmp_path / "out"))
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())
    # An expert sees fewer tokens than it has inputs: least squares then magnifies the last bit of an activation, which
    # depends on where in memory it lies.
    close = {"rtol": 1e-1, "atol": 5e-3} if kind == "moe" else {"rtol": 1e-4, "atol": 1e-6}
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, **close)
    assert report.removed == sum(int((~mask).sum()) for mask in expected.masks.values())
    assert nothing_hidden(tmp_path)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [DATA_FREE["layer"], CALIBRATED["sparsegpt"]], ids=["magnitude", "sparsegpt"])
def test_half_precision(dtype, settings, tmp_path):
    model, config = models.tiny_llama().to(dtype), PruningConfig(**settings)
    source, batches = saved(model, tmp_path / "source"), batches_for(config, model)
    expected, _ = pruned_in_memory(source, config, tmp_path / "expected", batches)
    prune_stream(source, config, tmp_path / "out", calibration=batches)
    found = load_native(str(tmp_path / "out"))
    models.assert_unchanged(found, models.snapshot(expected))
    assert found.dtype == dtype


def test_a_config_of_another_dtype_than_the_files(tmp_path):
    source = saved(models.tiny_llama(), tmp_path / "source")
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "dtype": "bfloat16"}))
    config = PruningConfig(0.5)
    expected, _ = pruned_in_memory(source, config, tmp_path / "expected", None)
    prune_stream(source, config, tmp_path / "out")
    models.assert_unchanged(load_native(str(tmp_path / "out")), models.snapshot(expected))
    dense, pruned = (load_native(str(source)), load_native(str(tmp_path / "out")))
    assert dense.dtype == pruned.dtype == torch.bfloat16
    for shard in source.glob("*.safetensors"):  # in the files they are as exact as before
        before, after = load_file(shard), load_file(tmp_path / "out" / shard.name)
        for name, tensor in after.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor[tensor != 0], before[name][tensor != 0])


@pytest.mark.parametrize("size", [SMALL_SHARDS, "1GB"], ids=["shards", "one file"])
def test_files_are_those_of_the_source_with_zeros(size, tmp_path):
    source = saved(models.tiny_bert(), tmp_path / "source", size)
    models.tiny_tokenizer().save_pretrained(source)
    out = tmp_path / "out"
    prune_stream(source, 0.5, out)
    added = {checkpoints.MASK_FILE, "sparsity_report.json"}
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()} | added | {MARK}
    for path in source.iterdir():
        if path.name == MARK:
            continue
        if path.suffix != ".safetensors":
            assert filecmp.cmp(path, out / path.name, shallow=False)
        else:
            length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            assert path.read_bytes()[:length] == (out / path.name).read_bytes()[:length]
            assert path.stat().st_size == (out / path.name).stat().st_size
    plain = AutoModelForSequenceClassification.from_pretrained(out)
    pruned = AutoPrunedModelForSequenceClassification.from_pretrained(out)
    assert int((plain.classifier.weight == 0).sum()) == 16
    assert len(pruned.masks) == 14
    assert pruned.pruning_config == PruningConfig(0.5)
    assert json.loads((out / "sparsity_report.json").read_text()) == json.loads(pruned.sparsity_report().to_json()) | {
        "tensors": json.loads((out / "sparsity_report.json").read_text())["tensors"]
    }


def test_tied_embeddings_stay_tied(tmp_path):
    source = saved(models.tiny_bert_mlm(), tmp_path / "source")
    config = PruningConfig(0.5, target_modules=["decoder", "query"])
    expected, report = pruned_in_memory(source, config, tmp_path / "expected", None)
    assert prune_stream(source, config, tmp_path / "out") == report
    found = load_native(str(tmp_path / "out"))
    models.assert_unchanged(found, models.snapshot(expected))
    assert found.get_input_embeddings().weight is found.get_output_embeddings().weight


def test_a_tied_weight_that_was_saved_twice_is_pruned_twice(tmp_path):
    source = saved(models.tiny_gpt2(), tmp_path / "source", "1GB")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    prune_stream(source, PruningConfig(0.5, target_modules=["lm_head"]), tmp_path / "out")
    pruned = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(pruned["lm_head.weight"], pruned["transformer.wte.weight"])
    assert int((pruned["lm_head.weight"] == 0).sum()) == 48 * 16 // 2


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.6, "scope": "global"},
        {"sparsity": 0.6, "criterion": "sparsegpt"},
        {"sparsity": 0.6, "criterion": "wanda"},
        {"granularity": "2:4"},  # some groups had lost more than two
    ],
    ids=["global", "sparsegpt", "wanda", "2:4"],
)
def test_earlier_masks_are_respected(settings, tmp_path):
    model = models.tiny_bert()
    source, batches = saved(model, tmp_path / "source"), models.tiny_batches(model)
    prune_stream(source, 0.3, tmp_path / "once", target_modules=["query", "dense", "classifier"])
    config = PruningConfig(exclude_modules=["classifier"], **settings)
    expected, _ = pruned_in_memory(tmp_path / "once", config, tmp_path / "expected", batches)
    report = prune_stream(tmp_path / "once", config, tmp_path / "out", calibration=batches)
    found = load_native(str(tmp_path / "out"))
    assert found.masks.keys() == expected.masks.keys()
    assert "classifier.weight" in found.masks
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=1e-4, atol=1e-6)
    assert report.removed == expected.sparsity_report().removed
    assert nothing_hidden(tmp_path)


def test_the_plan_is_that_of_the_model_and_reads_no_weight(tmp_path, monkeypatch):
    source, config = saved(models.tiny_bert(), tmp_path / "source"), PruningConfig(0.3, criterion="wanda")
    monkeypatch.setattr("hf_prune.checkpoint.shards.read_tensor", lambda *_: pytest.fail("read"))
    assert plan_stream(source, config) == load_native(str(source)).plan(config)


def test_out_is_not_the_source(tmp_path):
    source = saved(models.tiny_bert(), tmp_path / "source")
    before = contents(source)
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="source would replace itself: name another folder"):
            prune_stream(source, 0.5, source, overwrite=overwrite)
    assert contents(source) == before
    assert nothing_hidden(tmp_path)


# --- interruptions ----------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.fixture
def stop_before(monkeypatch) -> Callable[[int], None]:
    """Have the n-th record of the journal, from 0, not be written; -1: all are."""
    left = [-1]
    add = Journal.add

    def counted(self: Journal, record: dict, *written: Path) -> None:
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        add(self, record, *written)

    monkeypatch.setattr(Journal, "add", counted)
    return lambda n: left.__setitem__(0, n)


def step_of(record: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What a record of the journal says was done, and in which blocks."""
    return sorted(record), sorted({name.split(".")[2] for name in record.get("kept", {})})


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(DATA_FREE["layer"], marks=pytest.mark.crash, id="layer"),
        pytest.param(DATA_FREE["global"], id="global"),
        pytest.param(CALIBRATED["wanda"], marks=pytest.mark.crash, id="wanda"),
        pytest.param(CALIBRATED["sparsegpt"], id="sparsegpt"),
    ],
)
def test_an_interruption_at_any_stage_is_made_good(settings, tmp_path, stop_before, monkeypatch):
    model, config = models.tiny_llama(), PruningConfig(**settings)
    source, batches = saved(model, tmp_path / "source"), batches_for(config, model)
    steps = []
    with monkeypatch.context() as patch:
        add = Journal.add
        patch.setattr(Journal, "add", lambda self, *args: (steps.append(step_of(args[0])), add(self, *args)))
        prune_stream(source, config, tmp_path / "expected", calibration=batches)
    shards = len(list(source.glob("*.safetensors")))
    assert len(steps) == shards + 14 + 1 + (config.scope == "global")  # copies, weights, the move, the score to cut at
    written: list[str] = []
    write = stream_output.write_tensor
    monkeypatch.setattr(stream_output, "write_tensor", lambda *args: (written.append(args[1].name), write(*args)))
    out = tmp_path / "out"
    for number in [i for i, step in enumerate(steps) if i == 0 or step != steps[i - 1]] + [len(steps) - 3]:
        stop_before(number)  # the first of each kind, and one in the middle of a kind
        with pytest.raises(Stop):
            prune_stream(source, config, out, calibration=batches)
        assert not out.exists()
        stop_before(-1)
        done = {name for record in Journal(out).records for name in record.get("kept", {})}
        written.clear()
        prune_stream(source, config, out, calibration=batches)
        assert sorted(written) == sorted(name for name in load_native(str(out)).masks if name not in done)
        assert contents(out) == contents(tmp_path / "expected")
        assert nothing_hidden(tmp_path)
        shutil.rmtree(out)


def test_what_was_read_for_a_global_cut_is_not_read_again(tmp_path, stop_before, monkeypatch):
    source = saved(models.tiny_llama(), tmp_path / "source")
    shards = len(list(source.glob("*.safetensors")))
    reads: list[str] = []
    read = meta_model.read_tensor
    monkeypatch.setattr(meta_model, "read_tensor", lambda *args: (reads.append(args[1].name), read(*args))[1])
    stop_before(shards + 1 + 10)  # ten weights are done
    with pytest.raises(Stop):
        prune_stream(source, 0.5, tmp_path / "out", scope="global")
    stop_before(-1)
    reads.clear()
    prune_stream(source, 0.5, tmp_path / "out", scope="global")
    assert len(set(reads)) == 4  # one to have and one to score, for each of the four that were left
    assert len(reads) <= 12


def test_a_journal_line_that_was_cut_off_does_not_count(tmp_path, stop_before):
    source = saved(models.tiny_llama(), tmp_path / "source")
    prune_stream(source, 0.5, tmp_path / "expected")
    stop_before(8)
    with pytest.raises(Stop):
        prune_stream(source, 0.5, tmp_path / "out")
    stop_before(-1)
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    journal.write_text(journal.read_text()[:-20])
    prune_stream(source, 0.5, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("harm", ["shorten", "delete", "garbage"])
def test_an_unfinished_result_that_someone_changed_is_begun_anew(harm, tmp_path, stop_before):
    source = saved(models.tiny_llama(), tmp_path / "source")
    prune_stream(source, 0.5, tmp_path / "expected")
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    stop_before(len(shards) + 3)
    with pytest.raises(Stop):
        prune_stream(source, 0.5, tmp_path / "out")
    stop_before(-1)
    partial = tmp_path / ".out.partial"
    if harm == "shorten":
        os.truncate(partial / "checkpoint" / shards[0], 100)
    elif harm == "delete":
        (partial / "masks.bits").unlink()
    else:
        (partial / "journal.jsonl").write_text("no JSON\n{}\n")
    prune_stream(source, 0.5, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_another_run_in_the_way_is_refused_and_can_be_dropped(tmp_path, stop_before):
    model = models.tiny_llama()
    source, batches = saved(model, tmp_path / "source"), models.tiny_batches(model)
    stop_before(6)
    with pytest.raises(Stop):
        prune_stream(source, 0.5, tmp_path / "out", criterion="wanda", calibration=batches)
    stop_before(-1)
    before = contents(tmp_path / ".out.partial" / "checkpoint")
    with pytest.raises(CheckpointError, match="which differs in settings: repeat that run"):
        prune_stream(source, 0.6, tmp_path / "out", criterion="wanda", calibration=batches)
    with pytest.raises(CheckpointError, match="which differs in calibration data"):
        prune_stream(source, 0.5, tmp_path / "out", criterion="wanda", calibration=batches[:1])
    for shard in source.glob("*.safetensors"):
        os.utime(shard, ns=(1, 1))
    with pytest.raises(CheckpointError, match="which differs in weights"):
        prune_stream(source, 0.5, tmp_path / "out", criterion="wanda", calibration=batches)
    assert contents(tmp_path / ".out.partial" / "checkpoint") == before
    assert not (tmp_path / "out").exists()
    prune_stream(source, 0.6, tmp_path / "out", criterion="wanda", calibration=batches, restart=True)
    prune_stream(source, 0.6, tmp_path / "expected", criterion="wanda", calibration=batches)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.covering(1, "crash")
@pytest.mark.parametrize("moved", [0, 1, 3, 6])
@pytest.mark.parametrize("ends", ["error", "kill"])
def test_a_move_into_a_folder_that_was_interrupted_is_finished(moved, ends, tmp_path, monkeypatch):
    source, out = saved(models.tiny_llama(), tmp_path / "source"), saved(models.tiny_bert(), tmp_path / "out", "1GB")
    prune_stream(source, 0.5, tmp_path / "expected")
    old = contents(out)
    monkeypatch.setattr(staging_module, "_swap_names", lambda: None)
    place, left = staging_module._link_or_rename, [moved]

    def counted(path: Path, target: Path) -> None:
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        place(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(staging_module, "_link_or_rename", counted)
        if ends == "kill":  # nothing is put back
            patch.setattr(staging_module, "put_back", lambda staging, folder: None)
        with pytest.raises(Stop):
            prune_stream(source, 0.5, out, overwrite=True)
    if ends == "kill":
        assert not (out / "config.json").exists()  # so nobody takes it for a checkpoint
    else:
        assert contents(out) == old
    with pytest.raises(CheckpointError, match="which differs in settings: repeat that run"):
        prune_stream(source, 0.7, out, overwrite=True)  # which neither places nor replaces anything
    with pytest.raises(ConfigError, match="streaming does not train"):
        prune_stream(source, 0.7, out, overwrite=True, restart=True, criterion="movement")
    assert (out / "config.json").exists() is (ends == "error")
    report = stream_checkpoint(str(source), PruningConfig(sparsity=0.5), out)
    card = ("README.md", "pruning_card.json")
    assert {name: data for name, data in contents(out).items() if name not in card} == contents(tmp_path / "expected")
    assert report.target_sparsity == 0.5
    assert report.targets[0].before is not None
    assert nothing_hidden(tmp_path)


def test_a_run_that_begins_anew_finishes_what_was_placed_first(tmp_path, monkeypatch):
    source, out = saved(models.tiny_llama(), tmp_path / "source"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(placing, "place_folder", lambda *args: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            prune_stream(source, 0.5, out)
    assert not out.exists()
    with pytest.raises(PlanError, match="unknown module 'nobody'"):
        prune_stream(source, 0.7, out, restart=True, target_modules=["nobody"])
    assert not out.exists()
    prune_stream(source, 0.7, out, restart=True)
    assert load_native(str(out)).pruning_config.sparsity == 0.7
    assert nothing_hidden(tmp_path)


@pytest.mark.covering(1, "crash")
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("deleted", [0, 1, 3, 99])
def test_a_finished_result_stays_whole_if_only_the_cleaning_was_interrupted(deleted, links, tmp_path, monkeypatch):
    source, out = saved(models.tiny_llama(), tmp_path / "source"), tmp_path / "out"
    prune_stream(source, 0.5, tmp_path / "expected")
    prune_stream(source, 0.3, out)
    monkeypatch.setattr(staging_module, "_swap_names", lambda: None)
    if not links:
        monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))

    remove = Journal.remove

    def stopped(self: Journal) -> None:
        if not self.records:  # what begin() calls
            return remove(self)
        for path in sorted(self.staging.rglob("*"))[:deleted]:
            path.unlink()
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", stopped)
        with pytest.raises(Stop):
            prune_stream(source, 0.5, out)
    prune_stream(source, 0.5, out)
    assert contents(out) == contents(tmp_path / "expected")
    assert nothing_hidden(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "deep/notes.txt"])
def test_what_lies_beside_the_weights_is_copied_anew_after_an_interruption(name, tmp_path, monkeypatch):
    source, out = saved(models.tiny_llama(), tmp_path / "source"), tmp_path / "out"
    (source / "deep").mkdir()
    (source / name).write_text("{" + 1000 * " " + "}")
    copy = shutil.copyfile

    def stopped(path: Path, target: Path, **more: Any) -> Any:
        if not str(path).endswith(name):
            return copy(path, target, **more)
        Path(target).write_text("{")
        Path(target).with_name(".half.0123456789ab.tmp").write_text("{")
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", stopped)
        with pytest.raises(Stop):
            prune_stream(source, 0.5, out)
    prune_stream(source, 0.5, out)
    prune_stream(source, 0.5, tmp_path / "expected")
    assert contents(out) == contents(tmp_path / "expected")
    assert (out / name).read_text() == (source / name).read_text()


def test_what_got_into_the_output_before_it_was_placed_stays(tmp_path, monkeypatch):
    source, out = saved(models.tiny_llama(), tmp_path / "source"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(placing, "place_folder", lambda *args: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            prune_stream(source, 0.5, out)
    out.mkdir()
    (out / "config.json").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds config\.json, which hf-prune prune did not write"):
        prune_stream(source, 0.5, out)
    assert contents(out) == {"config.json": b"mine"}
    prune_stream(source, 0.5, out, overwrite=True)
    prune_stream(source, 0.5, tmp_path / "expected")
    assert contents(out) == contents(tmp_path / "expected")


@pytest.mark.parametrize("changed", ["config.json", "masks"])
def test_a_source_whose_config_or_masks_changed_is_another_one(changed, tmp_path, stop_before):
    source, out = tmp_path / "source", tmp_path / "out"
    prune_stream(saved(models.tiny_llama(), tmp_path / "dense"), 0.3, source)
    stop_before(6)
    with pytest.raises(Stop):
        prune_stream(source, 0.5, out)
    stop_before(-1)
    if changed == "masks":
        store = mask_file_module.load_masks(source / checkpoints.MASK_FILE)
        store.masks.popitem()
        mask_file_module.save_masks(store, source / checkpoints.MASK_FILE)
    else:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match=f"which differs in {changed}: repeat that run"):
        prune_stream(source, 0.5, out)


@pytest.mark.parametrize("what", ["file", "link", "folder"])
def test_what_has_the_name_of_the_hidden_folder_stays(what, tmp_path):
    source, hidden = saved(models.tiny_llama(), tmp_path / "source"), tmp_path / ".out.partial"
    elsewhere = hidden if what == "folder" else tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("mine")
    if what == "file":
        hidden.write_text("mine")
    elif what == "link":
        hidden.symlink_to(elsewhere)
    for restart in (False, True):
        with pytest.raises(CheckpointError, match="hf_prune did not write what is there"):
            prune_stream(source, 0.5, tmp_path / "out", restart=restart)
    assert (elsewhere / "mine.txt").read_text() == "mine"
    assert os.path.lexists(hidden)


@pytest.mark.covering(1, "crash")
@pytest.mark.parametrize(
    "record",
    [None, [], 5, {"tensors": None}, {"kept": [1]}, {"copied": 5}, {"copied": ["a.safetensors"]}, {"placing": ["*"]}],
    ids=str,
)
@pytest.mark.parametrize("first", [True, False])
def test_a_journal_line_of_another_shape_does_not_count(first, record, tmp_path, stop_before):
    source, out = saved(models.tiny_llama(), tmp_path / "source"), tmp_path / "out"
    stop_before(6)
    with pytest.raises(Stop):
        prune_stream(source, 0.5, out)
    stop_before(-1)
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    line = json.dumps(record).encode()
    line += b" " + f"{zlib.crc32(line):08x}\n".encode()
    journal.write_bytes(line + journal.read_bytes() if first else journal.read_bytes() + line)
    prune_stream(source, 0.5, out)
    prune_stream(source, 0.5, tmp_path / "expected")
    assert contents(out) == contents(tmp_path / "expected")


@pytest.mark.parametrize("settings", [{}, {"criterion": "wanda"}])
def test_a_full_disk_leaves_no_output(settings, tmp_path, monkeypatch):
    model = models.tiny_llama()
    source, out = saved(model, tmp_path / "source"), tmp_path / "out"
    write, left = stream_output.write_tensor, [4]

    def full(*args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    monkeypatch.setattr(stream_output, "write_tensor", full)
    with pytest.raises(OSError, match="No space left on device"):
        prune_stream(source, 0.5, out, calibration=models.tiny_batches(model), **settings)
    assert not out.exists()
    monkeypatch.undo()
    prune_stream(source, 0.5, out, calibration=models.tiny_batches(model), **settings)
    assert len(load_native(str(out)).masks) == 14


# --- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"polish": "distill"}, "a polish trains the whole model, which streaming never holds"),
        (
            {"criterion": "snip", "scope": "global", "repair": "least_squares"},
            "needs all masks before the first repair",
        ),
        ({"criterion": "taylor", "steps": 3}, "steps=3 takes gradients of a model that is pruned already.*expected 1"),
        ({"criterion": "wanda", "calibration_order": "one_pass"}, "calibration_order='one_pass' needs the statistics"),
    ],
)
def test_settings_that_need_the_model_are_refused(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        prune_stream(tmp_path / "nowhere", PruningConfig(0.5, **settings), tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        plan_stream(tmp_path / "nowhere", PruningConfig(0.5, **settings))


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(streamable, "rank_and_world_size", lambda: (0, 2))
    with pytest.raises(ConfigError, match="found 2 processes: expected one"):
        prune_stream(tmp_path, 0.5, tmp_path / "out")


def change(source: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def index(source: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    path = source / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    edit(values["weight_map"])
    path.write_text(json.dumps(values))


def config_json(source: Path, **values: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shard(source: Path) -> Path:
    return sorted(source.glob("*.safetensors"))[1]


@pytest.mark.parametrize(
    ("size", "harm", "message"),
    [
        (SMALL_SHARDS, lambda s: os.truncate(shard(s), 1000), "2-of-.* cannot be read as safetensors: .*download or"),
        (SMALL_SHARDS, lambda s: os.truncate(shard(s), 5), "2-of-.* cannot be read as safetensors"),
        (SMALL_SHARDS, lambda s: shard(s).unlink(), "2-of-.* is missing from .*, and the index says that"),
        (
            SMALL_SHARDS,
            lambda s: index(s, lambda m: m.update(other=shard(s).name)),
            "other is in .*, and it is in no fi",
        ),
        ("1GB", lambda s: (s / "model.safetensors").unlink(), "has no weights: expected model.safetensors, or"),
        (
            "1GB",
            lambda s: (s / "model.safetensors").rename(s / "pytorch_model.bin"),
            "has its weights in pytorch_model.bin, a pickle",
        ),
        (
            "1GB",
            lambda s: change(s, lambda t: t.pop("classifier.weight")),
            "has no weights for 1 of 41 parameters of BertForSequenceClassification .classifier.weight.*must name the",
        ),
        (
            "1GB",
            lambda s: change(
                s,
                lambda t: t.update(
                    {"classifier.weight_orig": t.pop("classifier.weight"), "classifier.weight_mask": torch.ones(2, 16)}
                ),
            ),
            "it was pruned with torch.nn.utils.prune: load it once without streaming",
        ),
        (
            "1GB",
            lambda s: change(s, lambda t: t.update({"classifier.weight": torch.ones(2, 15)})),
            r"classifier.weight of .* has shape \(2, 15\), and the model .* has \(2, 16\)",
        ),
        (
            "1GB",
            lambda s: config_json(s, quantization_config={"quant_method": "bitsandbytes"}),
            "is quantized with .bits",
        ),
    ],
    ids=[
        "truncated",
        "no header",
        "no shard",
        "index",
        "no weights",
        "pickle",
        "missing",
        "orig",
        "shape",
        "quantized",
    ],
)
def test_a_damaged_source_is_refused(size, harm, message, tmp_path):
    source = saved(models.tiny_bert(), tmp_path / "source", size)
    harm(source)
    with pytest.raises(CheckpointError, match=message):
        prune_stream(source, 0.5, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", -4),
        ("hidden_size", 0),
        ("num_attention_heads", 0),
        ("hidden_act", "nosuch"),
        ("attn_implementation", "nosuch"),
        ("pad_token_id", 99999),
        ("vocab_size", 0),
        ("dtype", 5),
        ("dtype", []),
    ],
)
def test_a_config_that_nobody_can_build_is_our_error(key, value, tmp_path):
    source = saved(models.tiny_bert(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, key: value}))
    for use in (lambda: prune_stream(source, 0.5, tmp_path / "out"), lambda: load_native(str(source))):
        with pytest.raises((CheckpointError, DataError), match=r"fit|is not one that save_pretrained wrote"):
            use()
    assert nothing_hidden(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_source_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        prune_stream("./no-such-folder", 0.5, tmp_path / "out")


def test_out_may_not_be_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file: expected a folder"):
        prune_stream(tmp_path, 0.5, tmp_path / "out")


def test_a_shard_that_shrinks_meanwhile_is_an_error(tmp_path, monkeypatch):
    source = saved(models.tiny_bert(), tmp_path / "source", "1GB")
    copy = stream_output.Output.copy_rest
    monkeypatch.setattr(
        stream_output.Output, "copy_rest", lambda self: (copy(self), os.truncate(source / "model.safetensors", 4000))
    )
    with pytest.raises(CheckpointError, match=r"model.safetensors ends within .*: it was changed; start again"):
        prune_stream(source, 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_model_does_not_know_is_copied_with_a_warning(tmp_path):
    source = saved(models.tiny_bert(), tmp_path / "source", "1GB")
    change(source, lambda tensors: tensors.update(extra=torch.arange(5)))
    with pytest.warns(UserWarning, match="1 tensors of .* do not belong to BertForSequenceClassification.*: extra"):
        prune_stream(source, 0.5, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["extra"], torch.arange(5))


def test_infinite_weights_are_refused(tmp_path):
    source = saved(models.tiny_bert(), tmp_path / "source", "1GB")
    change(source, lambda tensors: tensors["classifier.weight"].fill_(float("nan")))
    with pytest.raises(PlanError, match=r"NaN or infinite values in classifier.weight"):
        prune_stream(source, 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masks_of_other_weights_are_refused(tmp_path):
    source = saved(models.tiny_bert(), tmp_path / "source", "1GB")
    prune_stream(source, 0.5, tmp_path / "once")
    shutil.copy(tmp_path / "once" / checkpoints.MASK_FILE, source)
    with pytest.raises(CheckpointError, match=r"'bert.encoder.*' has non-zero weights that its mask removes"):
        prune_stream(source, 0.6, tmp_path / "out")
    config_json(source, architectures=["BertModel"])
    with pytest.raises(CheckpointError, match="has a mask, and the model has no such parameter"):
        with pytest.warns(UserWarning, match="classifier"):
            prune_stream(source, 0.6, tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_calibration_data_is_asked_for_before_anything_is_written(tmp_path):
    source = saved(models.tiny_bert(), tmp_path / "source")
    with pytest.raises(CalibrationError, match="criterion 'wanda' needs calibration data, and got none"):
        prune_stream(source, 0.5, tmp_path / "out", criterion="wanda")
    with pytest.raises(CalibrationError, match="calibration has no batches"):
        prune_stream(source, 0.5, tmp_path / "out", criterion="wanda", calibration=[])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_a_class_would_begin_at_random_is_no_weight(tmp_path, monkeypatch):
    """Transformers does not warn of some parameters that files lack; only those that are computed need no file."""
    model = models.tiny_bart()
    missing = ["model.encoder.embed_positions.weight", "model.encoder.layers.0.fc1.weight"]
    source = tmp_path / "source"
    kept = {n: v.clone() for n, v in model.state_dict().items() if n not in (*missing, "lm_head.weight")}
    kept = {n: v for n, v in kept.items() if "embed_tokens" not in n}
    model.save_pretrained(source, state_dict=kept)
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_missing", ["embed_positions", "fc1"])
    state = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=r"has no weights for 2 of .*model.encoder.embed_positions.weight, .*fc1"):
        prune_stream(source, 0.5, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_model_that_reaches_into_others_is_refused(tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    source = saved(models.tiny_llama(), tmp_path / "source")
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) * self.up_proj.weight.mean())
    with pytest.raises(PlanError, match="LlamaForCausalLM computes something from weights before they are read"):
        prune_stream(
            source, 0.5, tmp_path / "out", criterion="wanda", calibration=models.tiny_batches(models.tiny_llama())
        )
    assert not (tmp_path / "out").exists()


# --- memory -----------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that exist at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._known:
                    self._known.add(storage.data_ptr())
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return found

    def _gone(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.now -= size


BLOCKS = 5


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, int]:
    """A checkpoint of several blocks, and the bytes of a block."""
    model = models.tiny_llama(
        hidden_size=256, intermediate_size=688, num_hidden_layers=BLOCKS, num_attention_heads=4, num_key_value_heads=4
    )
    folder = saved(model, tmp_path_factory.mktemp("large"), "10MB")
    return folder, sum(p.numel() * 4 for p in model.model.layers[0].parameters())


def test_the_meter_sees_a_model(large):
    with Peak() as peak:
        model = load_native(str(large[0]))
        model.prune(0.5)
    assert peak.peak > BLOCKS * large[1] / 4  # at least the masks: the weights themselves may be mapped files


@pytest.mark.parametrize(
    ("settings", "statistics"),
    [
        ({}, 0),
        ({"scope": "global"}, 0),
        ({"criterion": "random"}, 0),
        ({"criterion": "wanda", "scope": "row"}, 12 * 688),
        ({"criterion": "sparsegpt"}, 16 * 688**2),  # a Gram matrix and the factor of its inverse
    ],
    ids=["layer", "global", "random", "wanda", "sparsegpt"],
)
def test_memory_is_that_of_a_block_and_its_statistics(settings, statistics, large, tmp_path):
    source, block = large
    ids = torch.randint(0, models.VOCAB, (4, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part} for part in ids.split(2)] if "criterion" in settings else None
    with Peak() as peak:
        report = prune_stream(source, 0.5, tmp_path / "out", calibration=batches, cache_bytes=0, **settings)
    assert peak.peak <= 1.1 * (block + statistics)
    assert peak.now < 0.1 * block
    assert report.target_sparsity == pytest.approx(0.5, abs=1e-3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == BLOCKS


def test_the_driver_is_used_for_what_learns_from_inputs(tmp_path, monkeypatch):
    model = models.tiny_llama()
    source, pruned = saved(model, tmp_path / "source"), []
    prune_tensor = stream_blocks.prune_tensor

    def noted(*arguments: Any, **more: Any) -> Any:
        pruned.append(arguments[2].target.name)
        return prune_tensor(*arguments, **more)

    monkeypatch.setattr(stream_blocks, "prune_tensor", noted)
    prune_stream(source, 0.5, tmp_path / "out", criterion="wanda", calibration=models.tiny_batches(model))
    assert len(pruned) == 14
    assert [name.split(".")[2] for name in pruned] == ["0"] * 7 + ["1"] * 7


@pytest.mark.skipif(not SHARED, reason="HF_PRUNE_SHARED names no folder with models/minilm-sst2 and data/sst2")
@pytest.mark.parametrize("settings", [{"criterion": "sparsegpt"}, {"scope": "global"}], ids=["sparsegpt", "global"])
def test_a_trained_model_is_pruned_bit_for_bit_as_in_memory(settings, tmp_path):
    source, config = Path(SHARED) / "models" / "minilm-sst2", PruningConfig(0.6, **settings)
    texts = load_texts(Path(SHARED) / "data" / "sst2", "train", text_column="sentence")[:32]
    batches = text_batches(texts, AutoTokenizer.from_pretrained(source)) if config.needs else None
    expected, report = pruned_in_memory(source, config, tmp_path / "expected", batches)
    assert prune_stream(source, config, tmp_path / "out", calibration=batches) == report
    models.assert_unchanged(load_native(str(tmp_path / "out")), models.snapshot(expected))
