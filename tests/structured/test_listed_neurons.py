"""Neurons inside experts that are modules of their own, or rows of one matrix: each expert keeps its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_prune
from hf_prune import MaskStore, prune, shrink
from hf_prune.architectures.kinds.registry import kind_named
from hf_prune.architectures.unit_groups import UnitGroup
from tests.architectures.custom_mixtures import mixture
from tests.moe_families import tiny_moe


@torch.no_grad()
def logits(model: Any, inputs: Any) -> Tensor:
    return model(**inputs).logits


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def made(name: str) -> tuple[Any, Any]:
    if name in ("jetmoe", "dbrx", "switch_transformers"):
        model, inputs = tiny_moe(name)
        return model, inputs()
    return mixture(name)


def neurons(model: Any) -> list[UnitGroup]:
    """The groups inside experts."""
    groups = kind_named("neuron").groups(model)
    return [group for group in groups if group.choices or ".experts." in group.name or ".parts." in group.name]


@pytest.mark.parametrize("name", ["listed", "reads_config", "three", "packed", "jetmoe", "dbrx", "switch_transformers"])
def test_neurons_go_from_every_expert(name: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    dense, groups = logits(model, inputs), neurons(model)
    assert groups
    assert {group.origin for group in groups} == {"found and proven"}
    prune(model, 0.5, granularity="neuron")
    masked = logits(model, inputs)
    assert not torch.allclose(masked, dense)
    masks = MaskStore.of(model).masks
    for group in groups:
        (first, *others) = [
            piece.by_unit(masks[piece.name], group.units, group.choices).all(-1) for piece in group.slices
        ]
        assert all(torch.equal(first, other) for other in others)
        if group.choices:
            assert len({tuple(row) for row in first.tolist()}) > 1  # experts keep different ones
    shrunk = shrink(copy.deepcopy(model))
    assert close(logits(shrunk, inputs), masked)
    after = {group.name: group.units for group in neurons(shrunk)}
    assert all(after[group.name] <= max(group.units // 2, group.step) for group in groups)
    hf_prune.prunable(shrunk).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert close(logits(loaded, inputs), masked)


def test_the_config_says_it_where_all_experts_are_alike(tmp_path: Path) -> None:
    model, inputs = mixture("listed")
    shrink(prune(model, 0.5, granularity="neuron"))
    assert model.config.ff == 24
    model.save_pretrained(tmp_path)
    assert '"structure"' not in (tmp_path / "config.json").read_text()
    assert close(logits(type(model).from_pretrained(tmp_path).eval(), inputs), logits(model, inputs))


@pytest.mark.parametrize("name", ["listed", "dbrx"])
def test_experts_and_the_neurons_of_the_others_go_together(name: str) -> None:
    model, inputs = made(name)
    before = model.num_parameters()
    plan = prune(copy.deepcopy(model), 0.5, granularity=("expert", "neuron"), dry_run=True)
    prune(model, 0.5, granularity=("expert", "neuron"))
    masked = logits(model, inputs)
    shrunk = shrink(model)
    assert close(logits(shrunk, inputs), masked)
    assert shrunk.num_parameters() == plan.parameters_after < 0.7 * before


def test_experts_that_are_numbered_attributes_lose_neurons_also_where_a_small_model_has_fewer(tmp_path: Path) -> None:
    model, inputs = mixture("numbered")
    prune(model, 0.5, granularity="neuron")
    masked = logits(model, inputs)
    shrunk = shrink(model)
    assert {getattr(block.moe, f"part{n}").w1.out_features for block in shrunk.stack for n in range(6)} == {24}
    assert close(logits(shrunk, inputs), masked)
    shrunk.save_pretrained(tmp_path)
    assert close(logits(type(shrunk).from_pretrained(tmp_path).eval(), inputs), masked)
