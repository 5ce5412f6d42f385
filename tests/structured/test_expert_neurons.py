"""Neurons inside packed experts: as many in each, and each expert its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_prune
from hf_prune import MaskStore, PlanError, prune, shrink
from hf_prune.architectures.expert_neurons import expert_neuron_groups
from tests.moe_families import tiny_moe

# Halves, interleaved with biases, transposed, without a gate, and beside shared experts of the same setting.
LAYOUTS = ["mixtral", "gpt_oss", "llama4", "nemotron_h", "deepseek_v3", "gemma4_text"]


@torch.no_grad()
def logits(model: Any, inputs: Any) -> Tensor:
    return model(**inputs()).logits


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_neurons_go_from_every_expert(model_type: str, tmp_path: Path) -> None:
    model, inputs = tiny_moe(model_type)
    dense, names = logits(model, inputs), [group.name for group in expert_neuron_groups(model)]
    assert names
    prune(model, 0.5, granularity="neuron")
    masked, masks = logits(model, inputs), MaskStore.of(model).masks
    assert not torch.equal(masked, dense)
    for group in expert_neuron_groups(model):
        kept = group.consumers[0].by_unit(masks[group.consumers[0].name], group.units, 8).all(-1)  # (experts, units)
        assert set(kept.sum(1).tolist()) == {8}
        assert len({tuple(row) for row in kept.tolist()}) > 1  # the experts keep different ones
        for piece in group.slices:
            assert torch.equal(piece.by_unit(masks[piece.name], group.units, 8).all(-1), kept)
    shrunk = shrink(copy.deepcopy(model))
    assert close(logits(shrunk, inputs), masked)
    assert {group.name: group.units for group in expert_neuron_groups(shrunk)} == dict.fromkeys(names, 8)
    hf_prune.prunable(shrunk).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert close(logits(loaded, inputs), masked)


def test_a_neuron_is_cut_with_its_own_weights() -> None:
    model, _ = tiny_moe("gpt_oss")
    experts = model.model.layers[1].mlp.experts
    before = {name: p.detach().clone() for name, p in experts.named_parameters()}
    prune(model, 0.5, granularity="neuron", exclude_modules=r".*(self_attn|layers\.0).*")
    kept = MaskStore.of(model).masks["model.layers.1.mlp.experts.down_proj"].all(2)  # (experts, neurons)
    shrink(model)
    for expert in range(8):
        rows = kept[expert].nonzero().reshape(-1)
        columns = torch.stack([2 * rows, 2 * rows + 1], 1).reshape(-1)  # each gate beside its up
        assert torch.equal(experts.down_proj[expert], before["down_proj"][expert][rows])
        assert torch.equal(experts.gate_up_proj[expert], before["gate_up_proj"][expert][:, columns])
        assert torch.equal(experts.gate_up_proj_bias[expert], before["gate_up_proj_bias"][expert][columns])
        assert torch.equal(experts.down_proj_bias[expert], before["down_proj_bias"][expert])


def test_the_config_says_it_where_all_layers_are_alike(tmp_path: Path) -> None:
    model, inputs = tiny_moe("qwen3_moe", moe_intermediate_size=32)
    shrink(prune(model, 0.5, granularity="neuron"))
    assert model.config.moe_intermediate_size == 16
    model.save_pretrained(tmp_path)
    assert '"structure"' not in (tmp_path / "config.json").read_text()
    assert close(logits(type(model).from_pretrained(tmp_path).eval(), inputs), logits(model, inputs))


def test_experts_and_the_neurons_of_the_others_go_together(tmp_path: Path) -> None:
    model, inputs = tiny_moe("mixtral", intermediate_size=32)
    before = model.num_parameters()
    settings: dict[str, Any] = {"granularity": ("expert", "neuron"), "sparsity": 0.6}
    plan = prune(copy.deepcopy(model), dry_run=True, **settings)
    assert plan.parameters_before == before
    prune(model, **settings)
    masked = logits(model, inputs)
    shrunk = shrink(model)
    assert close(logits(shrunk, inputs), masked)
    assert shrunk.num_parameters() == plan.parameters_after < 0.55 * before
    config = shrunk.config
    assert config.num_local_experts < 8
    assert config.intermediate_size < 32
    assert config.intermediate_size % 8 == 0  # or grouped products would refuse it
    shrunk.save_pretrained(tmp_path)
    assert close(logits(type(model).from_pretrained(tmp_path).eval(), inputs), masked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"repair": "least_squares"},
            r"cannot repair layers\.0\.mlp\.experts\.down_proj, whose experts share a",
        ),
        ({"granularity": ("expert", "neuron"), "scope": "global"}, r"one cannot be weighed against the other"),
    ],
)
def test_what_packed_experts_do_not_allow_is_refused(settings: dict[str, Any], message: str) -> None:
    model, inputs = tiny_moe("mixtral")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=message):
        prune(model, 0.5, calibration=[inputs()], **{"granularity": "neuron", **settings})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
