"""What ``docs/format.md`` says of files that another program reads is so."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_prune import MaskStore, PruningConfig, compress_checkpoint, prunable, prune
from hf_prune.checkpoint.mask_file import save_masks
from hf_prune.planning.schedule import Schedule
from hf_prune.pruning.records import PolishRecord
from tests import models

TEXT = (Path(__file__).parents[3] / "docs" / "format.md").read_text(encoding="utf-8")


def metadata_of(path):
    """What a file says of itself, and its tensors."""
    with safe_open(path, "np") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}


@pytest.mark.parametrize("record", [PruningConfig, PolishRecord, Schedule])
def test_every_setting_is_described(record):
    section = TEXT[TEXT.index("\n## How the masks came about") :]
    assert {field.name for field in dataclasses.fields(record)} <= set(re.findall(r"`(\w+)`", section))


def test_masks_are_read_by_what_is_said_of_them(tmp_path):
    masks = {"a.weight": torch.rand(3, 5) > 0.5, "b": torch.rand(16) > 0.5, "c.weight": torch.ones(0, 2).bool()}
    record = PolishRecord(1, 2, 3, 4, 5, 6.0, 7.0, 8.0, True)
    config = PruningConfig(0.3, polish="distill", schedule="cubic", allocation={"a": 0.5})
    save_masks(MaskStore(masks, config=config, polishes=(record,)), tmp_path / "masks")
    metadata, tensors = metadata_of(tmp_path / "masks")
    assert list(metadata) == ["hf_prune"]
    header = json.loads(metadata["hf_prune"])
    assert (header["format"], header["version"]) == ("hf_prune.masks", 1)
    assert set(header) == {"format", "version", "masks", "config", "polishes"}
    assert set(header["masks"]) == set(tensors) == set(masks)
    for name, mask in masks.items():
        entry, bits = header["masks"][name], tensors[name]
        assert (str(bits.dtype), bits.shape) == ("uint8", (-(-mask.numel() // 8),))
        assert (entry["shape"], entry["kept"]) == (list(mask.shape), int(mask.sum()))
        found = [(int(byte) >> place) & 1 for byte in bits for place in range(7, -1, -1)]
        assert found[: mask.numel()] == mask.reshape(-1).int().tolist()
        assert not any(found[mask.numel() :])
    assert header["config"]["format_version"] == 1
    assert set(header["config"]["polish"]) == {"epochs", "learning_rate"}
    assert set(header["config"]["schedule"]) == {"name", "begin", "end", "every", "initial"}
    assert header["polishes"][0]["trained"] == 5
    save_masks(MaskStore(masks), tmp_path / "masks")
    assert set(json.loads(metadata_of(tmp_path / "masks")[0]["hf_prune"])) == {"format", "version", "masks"}


def test_which_tensors_are_packed(tmp_path):
    zeros, noise = torch.zeros(64, 64), torch.randn(4, 4)
    tensors = {"a.weight": zeros, "weight": zeros.double(), "masked.weight": noise, "flat.weight": torch.ones(9)}
    tensors |= {"empty.weight": torch.zeros(0)}
    tensors |= {"in_proj_weight": zeros}  # it has a mask
    plain = {"gate_up_proj": zeros, "a.bias": torch.zeros(64), "i.weight": zeros.int(), "noise.weight": noise.clone()}
    plain |= {"norm.weight": torch.zeros(999)}
    (tmp_path / "dense").mkdir()
    save_file({n: t.clone() for n, t in (tensors | plain).items()}, tmp_path / "dense" / "model.safetensors")
    (tmp_path / "dense" / "config.json").write_text("{}")
    masks = {name: torch.ones_like(tensors[name]).bool() for name in ("masked.weight", "flat.weight")}
    masks |= {"in_proj_weight": zeros.bool(), "a.bias": torch.ones(64).bool(), "not.there": torch.ones(2).bool()}
    save_masks(MaskStore(masks), tmp_path / "dense" / "pruning_masks.safetensors")
    compress_checkpoint(tmp_path / "dense", tmp_path / "small")
    metadata, found = metadata_of(tmp_path / "small" / "model.safetensors")
    assert set(found) == {*tensors, *plain, *(f"{name}_packed" for name in tensors)}
    assert json.loads(metadata["hf_prune"])["pruning"] == {}
    assert set(metadata_of(tmp_path / "small" / "pruning_masks.safetensors")[1]) == {"a.bias", "not.there"}


def test_auto_map_and_settings_of_a_model(tmp_path):
    prune(prunable(models.tiny_bert()), 0.5).save_pretrained(tmp_path / "small", compressed=True, remote_code=True)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForMaskedLM"] == "modeling_hf_prune.BertForMaskedLM"
    assert (tmp_path / "small" / "modeling_hf_prune.py").is_file()
    described = json.loads(metadata_of(tmp_path / "small" / "model.safetensors")[0]["hf_prune"])
    assert described["pruning"] == {"config": PruningConfig(0.5).to_dict()}
    assert not (tmp_path / "small" / "pruning_masks.safetensors").exists()
