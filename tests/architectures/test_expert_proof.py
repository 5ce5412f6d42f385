"""Experts are proven before they are used: that they are gone is what a router that cannot choose them would give."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_prune
from hf_prune import MaskStore, PlanError, prune, shrink
from hf_prune.architectures.discovery import expert_proof, find, proven_experts
from hf_prune.architectures.discovery.barred import BarredExperts
from hf_prune.architectures.discovery.proven_experts import proven_blocks
from hf_prune.architectures.expert_groups import expert_group
from hf_prune.architectures.kinds.registry import kind_named
from hf_prune.architectures.memory import remembered
from hf_prune.architectures.moe_blocks import moe_blocks
from tests.architectures.custom_mixtures import MixModel, mixture
from tests.moe_families import tiny_moe


@torch.no_grad()
def logits(model: Any, inputs: Any) -> Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("block", ["listed", "reads_config", "three", "packed"])
def test_experts_of_custom_code_go(block: str, tmp_path: Path) -> None:
    model, inputs = mixture(block)
    dense = copy.deepcopy(model)
    groups = kind_named("expert").groups(model)
    assert [(group.units, group.minimum, group.origin) for group in groups] == [
        (6, 3 if block == "three" else 2, "found and proven")
    ] * 3
    prune(model, 0.5, granularity="expert")
    masked = logits(model, inputs)
    gone = {
        entry.router: (~MaskStore.of(model).masks[entry.router].any(1)).nonzero().reshape(-1)
        for entry in moe_blocks(model)
    }
    assert {len(units) for units in gone.values()} == {3}
    if block != "three":  # its scores get more added after the product that is watched
        with BarredExperts(dense, gone):
            assert torch.allclose(logits(dense, inputs), masked, atol=1e-5)
    shrunk = shrink(copy.deepcopy(model))
    assert torch.allclose(logits(shrunk, inputs), masked, atol=1e-6)
    assert shrunk.config.branches == 3
    shrunk.save_pretrained(tmp_path)
    loaded = MixModel.from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(loaded, inputs), masked, atol=1e-6)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("normed", "outputs are others without them than where no token may choose them"),
        ("first_always", "outputs are others without them than where no token may choose them"),
    ],
)
def test_experts_whose_removal_means_something_else_stay(block: str, said: str) -> None:
    model, inputs = mixture(block)
    before = copy.deepcopy(model.state_dict())
    assert len(moe_blocks(model)) == 3
    assert not kind_named("expert").groups(model)
    with pytest.raises(PlanError, match=f"the experts of stack.0.moe.* were found, but {said}"):
        prune(model, 0.5, granularity="expert")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert said in str(hf_prune.describe_units(model))
    assert logits(model, inputs).isfinite().all()


def test_where_the_code_reads_the_config_all_layers_keep_as_many() -> None:
    model, inputs = mixture("reads_config")
    with pytest.raises(PlanError, match=r"layers would keep 3 or 6 experts, and .* config\.branches"):
        prune(model, 0.5, granularity="expert", exclude_modules=r"stack\.0\..*")
    assert logits(model, inputs).isfinite().all()
    other, inputs = mixture("listed")
    prune(other, 0.5, granularity="expert", exclude_modules=r"stack\.0\..*")
    assert {group.units for group in kind_named("expert").groups(shrink(other))} == {3, 6}


def test_nllb_takes_the_first_experts_whatever_its_router_says() -> None:
    """Its code uses the mask of a token's experts as their numbers, so that the first two get all tokens."""
    model, _ = tiny_moe("nllb-moe")
    assert not kind_named("expert").groups(model)
    with pytest.raises(PlanError, match="were found, but outputs are others without them"):
        prune(model, 0.5, granularity="expert")


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_wrong_finding_does_not_pass(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that keep their weights while the router loses their rows would get the tokens of others."""
    from dataclasses import replace

    model, _ = tiny_moe(model_type)
    removable = expert_proof.removable_blocks

    def wrong(model: Any) -> list[Any]:
        return [replace(b, parameters=tuple(p for p in b.parameters if p.name == b.router)) for b in removable(model)]

    monkeypatch.setattr(expert_proof, "removable_blocks", wrong)
    monkeypatch.setattr(proven_experts, "removable_blocks", wrong)
    monkeypatch.setattr(proven_experts, "_PROOFS", {})
    blocks, (reason,) = proven_blocks(model)
    assert not blocks
    assert "were found, but" in reason


def test_what_is_said_of_a_mixture_that_is_proven() -> None:
    model, _ = tiny_moe("qwen3_moe")
    assert "Where its experts are: found and proven." in str(prune(model, 0.5, granularity="expert", dry_run=True))
    assert {place.origin for place in hf_prune.describe_units(model).units} == {"found and proven"}


def test_a_class_is_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    prove = proven_experts.prove_experts
    monkeypatch.setattr(proven_experts, "_PROOFS", {})
    monkeypatch.setattr(proven_experts, "prove_experts", lambda *args: calls.append(1) or prove(*args))
    for experts in (8, 16):
        model, _ = tiny_moe("mixtral", num_local_experts=experts)
        assert len(kind_named("expert").groups(model)) == len(proven_blocks(model)[0]) == 2
    assert len(calls) == 1


def test_only_so_much_is_remembered() -> None:
    memory: dict[int, int] = {}
    assert [remembered(memory, key, lambda key=key: key * key, 3) for key in range(6)] == [0, 1, 4, 9, 16, 25]
    assert memory == {3: 9, 4: 16, 5: 25}
    assert remembered(memory, 5, lambda: 0, 3) == 25
    assert len(find._FOUND) <= find._MOST_REMEMBERED


def test_a_proof_leaves_nothing_behind() -> None:
    model, _ = tiny_moe("mixtral")
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    proven_experts._PROOFS.clear()
    (block, _), reasons = proven_blocks(model)
    assert not reasons
    assert expert_group(model, block).units == 8
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_experts_of_which_a_part_is_not_saved_stay() -> None:
    model, _ = mixture("prior")
    with pytest.raises(PlanError, match=r"moe\.prior of MixModel has a part for each .* is not saved with the model"):
        prune(model, 0.5, granularity="expert")
