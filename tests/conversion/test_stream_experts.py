"""Checkpoints with experts are streamed, whether their files have each matrix of each expert or packed parameters."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_prune.auto import AutoPrunedModelForCausalLM
from hf_prune.checkpoint.files import MASK_FILE
from hf_prune.conversion.compression import compress_checkpoint
from hf_prune.conversion.decompression import decompress_checkpoint
from hf_prune.conversion.streaming import meta_model
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.conversion.streaming.prune_stream import prune_stream
from hf_prune.errors import CheckpointError
from hf_prune.mixin import prunable
from hf_prune.planning.config import PruningConfig
from tests.models import assert_unchanged, snapshot
from tests.moe_models import FAMILIES, packed, tiny_mixture
from tests.pruning.test_packed_experts import batches

pytestmark = pytest.mark.filterwarnings("ignore:.*experts that saw (fewer|no) calibration token")
ONE_BY_ONE = ["mixtral", "qwen3_moe", "deepseek_v3", "nemotron_h"]


def saved(family, folder):
    """Small shards, so that the matrices of an expert lie in several files."""
    tiny_mixture(family).save_pretrained(folder, max_shard_size="12KB")
    return folder


def pruned_in_memory(source, config, data):
    model = prunable(AutoModelForCausalLM.from_pretrained(source))
    model.config._experts_implementation = "eager"
    model.prune(config, calibration=data)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_the_same_masks_as_in_memory(family, criterion, tmp_path):
    source, config = saved(family, tmp_path / "source"), PruningConfig(0.5, criterion=criterion)
    data = None if criterion == "magnitude" else batches()
    report = prune_stream(source, config, tmp_path / "out", calibration=data)
    model = pruned_in_memory(source, config, data)
    loaded = AutoPrunedModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_unchanged(loaded, snapshot(model))
    assert all(torch.equal(mask, loaded.masks[name]) for name, mask in model.masks.items())
    assert report.nonzero == model.sparsity_report().nonzero
    assert {t.name: t.nonzero for t in report.tensors} == {t.name: t.nonzero for t in model.sparsity_report().tensors}
    assert sorted(p.name for p in (tmp_path / "out").glob("model*")) == sorted(p.name for p in source.glob("model*"))


@pytest.mark.parametrize("settings", [{"granularity": "2:4"}, {"scope": "global"}, {"repair": "least_squares"}])
def test_the_same_in_other_settings(settings, tmp_path):
    source, config = saved("mixtral", tmp_path / "source"), PruningConfig(**{"sparsity": 0.5, **settings})
    data = batches() if config.repair else None
    prune_stream(source, config, tmp_path / "out", calibration=data)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_unchanged(loaded, snapshot(pruned_in_memory(source, config, data)))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_that_are_not_pruned_are_copied_and_counted(family, tmp_path):
    source, config = saved(family, tmp_path / "source"), PruningConfig(0.5, exclude_modules=["experts"])
    report = prune_stream(source, config, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(source)
    for tensor in report.tensors:
        if tensor.name in packed(model):
            assert tensor.nonzero == int(model.get_parameter(tensor.name).count_nonzero())
    prune_stream(tmp_path / "out", PruningConfig(0.5), tmp_path / "more")  # and what was pruned before stays
    assert json.loads((tmp_path / "more" / "sparsity_report.json").read_text())["target_sparsity"] == 0.5
    again = prune_stream(tmp_path / "more", PruningConfig(0.75, target_modules=["experts"]), tmp_path / "last")
    assert {t.parameters - 4 * t.nonzero for t in again.tensors if t.name in packed(model)} == {0}


class Stop(Exception):
    pass


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_an_interrupted_stream_goes_on(criterion, tmp_path, monkeypatch):
    source, config = saved("mixtral", tmp_path / "source"), PruningConfig(0.5, criterion=criterion)
    data = None if criterion == "magnitude" else batches()
    prune_stream(source, config, tmp_path / "expected", calibration=data)
    add, left = Journal.add, [0]

    def counted(self, record, *written):
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        add(self, record, *written)

    monkeypatch.setattr(Journal, "add", counted)
    stops = 0
    while True:
        left[0] = stops + 1
        try:
            prune_stream(source, config, tmp_path / "out", calibration=data)
            break
        except Stop:
            stops += 3
    assert stops > 3
    for path in (tmp_path / "expected").iterdir():
        if path.suffix == ".safetensors" and path.name != MASK_FILE:
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_compressed_and_back(family, tmp_path):
    source = saved(family, tmp_path / "source")
    prune_stream(source, PruningConfig(0.5), tmp_path / "out")
    before = snapshot(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    compress_checkpoint(tmp_path / "out", tmp_path / "small")
    model = AutoPrunedModelForCausalLM.from_pretrained(tmp_path / "small")
    assert_unchanged(model, before)
    assert set(packed(model)) <= set(model.masks)
    names = [name for path in (tmp_path / "small").glob("model*.safetensors") for name in load_file(path)]
    experts = [name.removesuffix("_packed") for name in names if ".experts." in name and name.endswith("_packed")]
    assert len(experts) >= len(packed(model))  # experts are packed in the files as well
    decompress_checkpoint(tmp_path / "small", tmp_path / "back")
    assert_unchanged(AutoModelForCausalLM.from_pretrained(tmp_path / "back"), before)


def test_experts_that_do_not_fit_the_config_are_refused(tmp_path):
    tiny_mixture("mixtral").save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("experts.3.w1.weight"))
    removed = tensors.pop(lost)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"gate_up_proj .*is merged from tensors in its files, 3 of .*do not fit"):
        prune_stream(tmp_path / "source", 0.5, tmp_path / "out")
    save_file({**tensors, lost: removed[:5].contiguous()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"is merged from tensors in its files, 4 of \(24, 16\) or \(5, 16\)|or"):
        prune_stream(tmp_path / "source", 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_matrix_of_every_expert_is_read_once(tmp_path, monkeypatch):
    source = saved("mixtral", tmp_path / "source")
    read, names = meta_model.read_tensor, []
    monkeypatch.setattr(
        meta_model, "read_tensor", lambda folder, entry: (names.append(entry.name), read(folder, entry))[1]
    )
    prune_stream(source, PruningConfig(0.5), tmp_path / "out")
    assert sum(".experts." in name for name in names) == 2 * 4 * 3  # layers, experts, matrices: each of them once
