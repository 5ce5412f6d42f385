"""Experts and neurons go from a checkpoint that is never loaded: the files are those of prune, shrink and save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_prune import CheckpointError, ConfigError, PlanError, PruningConfig, plan_stream, prune, prune_stream
from hf_prune.auto import load_native
from hf_prune.checkpoint.files import MASK_FILE, SPARSITY_REPORT
from tests.moe_families import tiny_moe
from tests.support.streams import Stop, assert_same_files, prune_in_memory, stop_at_record, tensors

EXPERTS: dict[str, Any] = {"granularity": "expert", "sparsity": 0.5}
SMALL = "12KB"  # of a file: the experts of a layer lie in several


def batches() -> list[dict[str, Tensor]]:
    """The second one has padding."""
    ids = [(torch.arange(24).view(2, 12) * (i + 1) + i) % 60 + 3 for i in range(3)]
    mask = torch.ones_like(ids[1])
    mask[0, 9:] = 0
    return [{"input_ids": ids[0]}, {"input_ids": ids[1], "attention_mask": mask}, {"input_ids": ids[2]}]


def saved(family: str, folder: Path, **options: Any) -> Path:
    tiny_moe(family)[0].save_pretrained(folder, **options)
    return folder


def in_memory(source: Path, config: PruningConfig, out: Path) -> None:
    prune_in_memory(source, config, batches(), out)


def streamed(source: Path, config: PruningConfig, out: Path) -> Any:
    return prune_stream(source, config, out, calibration=batches() if config.needs_data else None)


@pytest.mark.parametrize("criterion", ["magnitude", "reap"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_the_files_are_those_of_a_pruning_in_memory(family: str, criterion: str, tmp_path: Path) -> None:
    source, config = saved(family, tmp_path / "source"), PruningConfig(criterion=criterion, **EXPERTS)
    in_memory(source, config, tmp_path / "expected")
    streamed(source, config, tmp_path / "out")
    assert_same_files(tmp_path / "expected", tmp_path / "out")
    report = json.loads((tmp_path / "out" / SPARSITY_REPORT).read_text())
    assert report["structure"]["needs_plugin"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    experts = [module for name, module in loaded.named_modules() if name.endswith(".mlp.experts")]
    assert {len(module.down_proj) for module in experts} == {4}


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({**EXPERTS, "criterion": "frequency"}, {"save_original_format": False}),  # packed in the files as well
        ({**EXPERTS, "criterion": "reap", "scope": "global"}, {}),
        ({"granularity": "neuron", "criterion": "magnitude", "scope": "layer", "sparsity": 0.5}, {}),
    ],
)
def test_other_settings_and_several_files(settings: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    source = saved("mixtral", tmp_path / "source", max_shard_size=SMALL, **options)
    config = PruningConfig(**settings)
    in_memory(source, config, tmp_path / "expected")
    streamed(source, config, tmp_path / "out")
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("expected", "out"))
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = tensors(tmp_path / "out")
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    files = {path.name for path in (tmp_path / "out").glob("model*.safetensors")}
    assert files == set(index["weight_map"].values())


def test_an_interrupted_stream_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved("mixtral", tmp_path / "source", max_shard_size=SMALL)
    config = PruningConfig(criterion="reap", **EXPERTS)
    streamed(source, config, tmp_path / "expected")
    left, _ = stop_at_record(monkeypatch)
    for steps in (1, 4, 3):  # while blocks are observed, while tensors are counted, and while files are written
        left[0] = steps
        with pytest.raises(Stop):
            streamed(source, config, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    left[0] = -1
    streamed(source, config, tmp_path / "out")
    for path in (tmp_path / "expected").iterdir():
        if not path.name.startswith("."):
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_experts_that_saw_no_token_are_named_as_in_memory(tmp_path: Path) -> None:
    source, config = saved("mixtral", tmp_path / "source"), PruningConfig(criterion="reap", **EXPERTS)
    few = [{"input_ids": torch.tensor([[5]])}]
    with pytest.warns(UserWarning, match="experts saw no calibration token") as expected:
        prune(load_native(str(source)), config, calibration=few)
    with pytest.warns(UserWarning, match="experts saw no calibration token") as found:
        prune_stream(source, config, tmp_path / "out", calibration=few)
    assert [str(warning.message) for warning in found] == [str(warning.message) for warning in expected]


def test_what_the_class_does_not_load_is_left_out(tmp_path: Path) -> None:
    source = saved("deepseek_v3", tmp_path / "source")
    held = load_file(source / "model.safetensors")
    # More layers that predict tokens, which transformers ignores, hold as many experts as the config counted.
    further = {f"model.layers.61.mlp.experts.{i}.up_proj.weight": torch.ones(20, 32) for i in range(8)}
    save_file({**held, **further}, source / "model.safetensors", {"format": "pt"})
    prune_stream(source, PruningConfig(**EXPERTS), tmp_path / "out")
    assert not any(".61." in name for name in tensors(tmp_path / "out"))


def test_the_plan_says_how_many_stay_and_nothing_is_written_beyond_the_budget(tmp_path: Path) -> None:
    source = saved("deepseek_v3", tmp_path / "source")
    plan = plan_stream(source, PruningConfig(criterion="reap", **EXPERTS))
    assert [site["kept"] for site in plan.to_dict()["sites"]] == [4]
    with pytest.raises(PlanError, match=r"budget of .* cannot be met"):  # two experts in each of two groups stay
        prune_stream(source, PruningConfig(granularity="expert", sparsity=0.75), tmp_path / "out")
    (source / MASK_FILE).write_bytes(b"")
    with pytest.raises(CheckpointError, match="has masks of single weights"):
        prune_stream(source, PruningConfig(**EXPERTS), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.strip(".").startswith("out")] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"granularity": "head", "criterion": "fisher", "repair": "least_squares", "calibration_order": "one_pass"},
            "calibration_order='one_pass' needs the statistics of all weights at once",
        ),
        ({"granularity": "expert", "target_flops": 0.5}, "target_flops=0.5 runs the whole model"),
    ],
)
def test_what_needs_the_whole_model_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        prune_stream(tmp_path / "nowhere", PruningConfig(**settings), tmp_path / "out")
