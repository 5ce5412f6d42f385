"""LoRA on mixtures of experts that are pruned: zeros stay zeros, and experts that are gone stay gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_prune import ArchitectureError, CheckpointError, MaskStore, merge_lora, prune, shrink
from tests.moe_families import tiny_moe

peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
PACKED = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@torch.no_grad()
def logits(model: Any, inputs: Any) -> Tensor:
    return model(**inputs).logits


def trained(model: Any, inputs: Any, **settings: Any) -> Any:
    """The model with adapters, after one step."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)).eval()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    return wrapped


@pytest.mark.parametrize("settings", [ATTENTION, PACKED], ids=["attention", "experts"])
def test_merging_keeps_the_zeros_of_packed_experts(settings: dict[str, Any], tmp_path: Path) -> None:
    model, make = tiny_moe("qwen3_moe")
    inputs = make()
    prune(model, 0.5)
    masks = {name: mask.clone() for name, mask in MaskStore.of(model).masks.items()}
    assert any(mask.dim() == 3 for mask in masks.values())
    before = logits(model, inputs)
    wrapped = trained(model, inputs, **settings)
    assert not torch.equal(logits(wrapped, inputs), before)
    wrapped.save_pretrained(tmp_path / "adapters")
    report = merge_lora(wrapped)
    for name, mask in masks.items():
        assert not report.model.get_parameter(name).detach()[~mask].any()
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert not torch.equal(logits(report.model, inputs), before)
    report.model.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(loaded, inputs), logits(report.model, inputs), atol=1e-5)


def test_adapters_beside_experts_that_are_switched_off(tmp_path: Path) -> None:
    model, make = tiny_moe("qwen3_moe")
    inputs = make()
    prune(model, 0.5, granularity="expert")
    wrapped = trained(model, inputs, **ATTENTION)
    with pytest.raises(CheckpointError, match=r"experts are switched off .* call shrink\(\) first"):
        wrapped.save_pretrained(tmp_path / "adapters")
    with_adapters = logits(wrapped, inputs)
    merged = merge_lora(wrapped).model
    assert torch.allclose(logits(merged, inputs), with_adapters, atol=1e-5)
    with pytest.raises(CheckpointError, match="experts are switched off"):
        merged.save_pretrained(tmp_path / "merged")
    assert not list(tmp_path.rglob("*.safetensors"))
    shrunk = shrink(merged)
    assert shrunk.config.num_experts == 4
    shrunk.save_pretrained(tmp_path / "shrunk")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shrunk").eval()
    assert torch.allclose(logits(loaded, inputs), with_adapters, atol=1e-5)


def test_experts_that_are_switched_off_get_no_adapters_of_their_own(tmp_path: Path) -> None:
    model, make = tiny_moe("qwen3_moe")
    inputs = make()
    prune(model, 0.5, granularity="expert")
    masked = logits(model, inputs)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **PACKED)).eval()
    with pytest.raises(ArchitectureError, match=r"gate_up_proj is no longer in its module .* call shrink\(\) before"):
        wrapped(**inputs)
    assert torch.equal(logits(wrapped.unload(), inputs), masked)
    other, _ = tiny_moe("qwen3_moe")
    shrink(prune(other, 0.5, granularity="expert"))
    adapted = trained(other, inputs, **PACKED)
    expected = logits(adapted, inputs)
    merged = adapted.merge_and_unload()
    assert torch.allclose(logits(merged, inputs), expected, atol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(loaded, inputs), expected, atol=1e-5)


def test_plain_saving_of_a_masked_mixture_leaves_nothing_that_loads_as_another_model(tmp_path: Path) -> None:
    model, make = tiny_moe("qwen3_moe")
    inputs = make()
    prune(model, 0.5, granularity="expert")
    masked = logits(model, inputs)
    with pytest.raises(CheckpointError, match="experts are switched off"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    shrink(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.num_experts == 4
    assert torch.allclose(logits(loaded, inputs), masked, atol=1e-5)
