"""Streaming with gradients that are carried down from block to block: the masks of a pruning in memory."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_prune import PruningConfig, prune_stream
from hf_prune.auto import load_native
from hf_prune.calibration import blockwise_sensitivity
from hf_prune.calibration.blockwise_sensitivity import measure_by_blocks
from hf_prune.calibration.input_reader import InputReader
from hf_prune.calibration.sensitivity import measure_sensitivity
from hf_prune.checkpoint.files import MASK_FILE
from hf_prune.errors import CalibrationError, PlanError
from hf_prune.kernels import chunked_logits
from hf_prune.planning.make_plan import make_plan
from hf_prune.planning.plan import targets_of
from tests import models
from tests.support.streams import stop_at_weight

SETTINGS: dict[str, dict[str, Any]] = {
    "alps by loss": {"criterion": "alps", "objective": "loss", "sparsity": 0.6},
    "the best preset": {"preset": "best", "sparsity": 0.6},
    "magnitude, fisher": {"criterion": "magnitude", "allocation": "fisher", "sparsity": 0.5},
    "wanda, owl": {"criterion": "wanda", "allocation": "owl", "scope": "row", "sparsity": 0.5},
    "sparsegpt by loss, 2:4": {"criterion": "sparsegpt", "objective": "loss", "granularity": "2:4"},
}
KINDS = {"llama": models.tiny_llama, "gpt2": models.TRANSFORMERS["gpt2"], "bert": models.TRANSFORMERS["bert"]}


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="5KB")
    return folder


@pytest.mark.covering(1)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_a_pruning_in_memory(kind, settings, tmp_path):
    model = KINDS[kind]()
    source, config = saved(model, tmp_path / "source"), PruningConfig(**settings)
    batches = models.tiny_batches(model)
    expected = load_native(str(source)).prune(config, calibration=batches)
    expected.save_pretrained(tmp_path / "expected")
    prune_stream(source, config, tmp_path / "out", calibration=batches, cache_bytes=0)
    assert filecmp.cmp(tmp_path / "expected" / MASK_FILE, tmp_path / "out" / MASK_FILE, False)
    found = load_native(str(tmp_path / "out"))
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=1e-3, atol=1e-5)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_sensitivities_are_those_of_one_backward_pass(kind):
    model = {**KINDS, "mixtral": tiny_mixtral}[kind]().eval()
    targets = targets_of(make_plan(model, PruningConfig(0.5, criterion="alps", objective="loss")))
    batches = models.tiny_batches(model)
    with InputReader(model, targets, batches) as reader, torch.no_grad():
        reader.order()
        expected = measure_sensitivity(reader, 0)
        found = measure_by_blocks(reader, 0, cache_bytes=2**30)
    assert found.misplaced == expected.misplaced
    for target in targets:
        name = target.name
        torch.testing.assert_close(found.outputs[name], expected.outputs[name], rtol=1e-4, atol=1e-10)
        if name not in found.misplaced:
            for batch in range(len(batches)):
                ours, theirs = found.weights(name, batch, 0), expected.weights(name, batch, 0)
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def tiny_mixtral():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return models.fill(
        MixtralForCausalLM(MixtralConfig(vocab_size=models.VOCAB, num_key_value_heads=2, num_local_experts=3, **sizes))
    )


def test_a_large_vocabulary_is_streamed_in_chunks(tmp_path, monkeypatch):
    """Windows one by one, five tokens at a time in the output layer, whose weight is read when it is called."""
    model = models.fill(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=96,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
            )
        )
    )
    source = saved(model, tmp_path / "source")
    ids = torch.randint(0, 96, (3, 10), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    config = PruningConfig(0.5, criterion="sparsegpt", objective="loss")
    monkeypatch.setattr(chunked_logits, "CHUNK", 96 * 5)
    monkeypatch.setattr("hf_prune.calibration.batches._MOST_LOGITS", 96 * 10)
    expected = load_native(str(source)).prune(config, calibration=batches)
    prune_stream(source, config, tmp_path / "out", calibration=batches)
    found = load_native(str(tmp_path / "out"))
    for name, mask in expected.masks.items():
        assert torch.equal(found.masks[name], mask)


def test_an_interrupted_run_goes_on_with_dense_outputs(tmp_path, monkeypatch):
    """What was pruned before is read as the source has it where the dense model is asked."""
    model = models.tiny_llama()
    source, batches = saved(model, tmp_path / "source"), models.tiny_batches(model)
    config = PruningConfig(0.6, criterion="alps", objective="loss", allocation="fisher", repair="least_squares")
    prune_stream(source, config, tmp_path / "whole", calibration=batches)
    stop_at_weight(monkeypatch, 9)
    with pytest.raises(KeyboardInterrupt):
        prune_stream(source, config, tmp_path / "out", calibration=batches)
    monkeypatch.undo()
    prune_stream(source, config, tmp_path / "out", calibration=batches)
    assert filecmp.cmp(tmp_path / "whole" / MASK_FILE, tmp_path / "out" / MASK_FILE, False)
    whole, resumed = (load_native(str(tmp_path / name)).state_dict() for name in ("whole", "out"))
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-5, atol=1e-7)


def test_models_without_one_row_of_blocks_are_refused(tmp_path):
    model = models.tiny_t5()
    source = saved(model, tmp_path / "source")
    config = PruningConfig(0.5, criterion="alps", objective="loss")
    with pytest.raises(PlanError, match="found 2 lists of blocks, expected one that every batch uses"):
        prune_stream(source, config, tmp_path / "out", calibration=models.tiny_batches(model))
    assert not (tmp_path / "out").exists()


def test_blocks_are_not_left_with_hooks_if_a_gradient_is_not_finite(tmp_path, monkeypatch):
    model = models.tiny_llama().eval()
    targets = targets_of(make_plan(model, PruningConfig(0.5, criterion="alps", objective="loss")))
    real = blockwise_sensitivity.run_backwards

    def infinite(reader, window, head, generator):
        real(reader, window, head, generator)
        reader.model.lm_head.weight.data.fill_(float("nan"))

    monkeypatch.setattr(blockwise_sensitivity, "run_backwards", infinite)
    with InputReader(model, targets, models.tiny_batches(model)) as reader, torch.no_grad():
        reader.order()
        with pytest.raises(CalibrationError, match="not finite"):
            measure_by_blocks(reader, 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())
