"""Experts: masked, shrunk and reloaded models are the same, whatever the family calls its parts."""

from __future__ import annotations

import copy
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_prune
from hf_prune import ArchitectureError, CheckpointError, ConfigError, MaskStore, PlanError, prune, shrink
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.architectures.moe_blocks import moe_blocks, unusable_experts
from hf_prune.architectures.switched_off import layers_without_units
from tests.moe_families import MODELS, tiny_moe


@torch.no_grad()
def logits(model: Any, inputs: Any) -> Tensor:
    return model(**inputs()).logits


def experts_of(model: Any) -> list[Any]:
    return [group for group in find_unit_groups(model) if group.kind == "expert"]


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to what the alignment of tensors in memory does to a matrix product."""
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("model_type", MODELS)
def test_half_of_the_experts_go(model_type: str, tmp_path: Path) -> None:
    """Those that stay keep their weights, rows and corrections, in order."""
    model, inputs = tiny_moe(model_type)
    dense, before, groups = logits(model, inputs), model.num_parameters(), experts_of(model)
    assert groups
    assert {group.units for group in groups} == {8}
    tensors = {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    prune(model, 0.5, granularity="expert")
    masked = logits(model, inputs)
    assert not torch.equal(masked, dense)
    masks = MaskStore.of(model).masks
    assert all((model.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())
    shrunk = shrink(copy.deepcopy(model))
    assert torch.equal(logits(shrunk, inputs), masked)
    left = experts_of(shrunk)
    assert {group.units for group in left} == {4}
    assert shrunk.num_parameters() == before - sum(int((~mask).sum()) for mask in masks.values())
    for group, after in zip(groups, left, strict=True):
        piece = group.slices[0]
        kept = piece.by_unit(masks[piece.name], 8).all(1).nonzero().reshape(-1)
        assert len(kept) == 4
        if group.runs > 1:
            counts = torch.bincount(kept // (8 // group.runs), minlength=group.runs)
            assert counts.tolist() == [4 // group.runs] * group.runs
        for piece in (*after.slices, *after.buffers):
            found = dict([*shrunk.named_parameters(), *shrunk.named_buffers()])[piece.name]
            assert torch.equal(piece.by_unit(found, 4), piece.by_unit(tensors[piece.name], 8)[kept])
        if group.lists:
            for names, old in zip(
                after.own_parameters(shrunk, range(4)), group.own_parameters(model, kept.tolist()), strict=True
            ):
                assert names
                assert all(torch.equal(shrunk.get_parameter(n), tensors[o]) for n, o in zip(names, old, strict=True))
    shrunk.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert getattr(loaded.config, "quantization_config", None) is None  # plain transformers builds it
    assert close(logits(loaded, inputs), masked)
    assert {name: tuple(p.shape) for name, p in loaded.named_parameters()} == {
        name: tuple(p.shape) for name, p in shrunk.named_parameters()
    }


def test_a_masked_model_is_copied_pickled_and_trained() -> None:
    model, inputs = tiny_moe("mixtral")
    prune(model, 0.5, granularity="expert", keep_dense=True)
    masked = logits(model, inputs)
    assert torch.equal(logits(copy.deepcopy(model), inputs), masked)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), inputs), masked)
    model(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    packed, mask = model.model.layers[0].mlp.experts.down_proj, MaskStore.of(model).masks
    assert (packed.grad[~mask["model.layers.0.mlp.experts.down_proj"]] == 0).all()
    assert packed.grad.abs().sum() > 0
    assert packed.shape[0] == 8


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_trained_without_the_experts_that_are_off(reentrant: bool) -> None:
    model, inputs = tiny_moe("deepseek_v3")
    prune(model, 0.5, granularity="expert")

    def gradients() -> dict[str, Tensor]:
        model.train().zero_grad()
        model(**inputs(), labels=inputs()["input_ids"], use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    model.activation_checkpointing_disable()
    assert all(torch.equal(g, expected[name]) for name, g in gradients().items())
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


def test_a_masked_model_runs_in_several_threads() -> None:
    model, inputs = tiny_moe("mixtral")
    prune(model, 0.5, granularity="expert")
    masked = logits(model, inputs)
    for layer in model.model.layers:  # the others come in the meantime
        layer.mlp.experts.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    with ThreadPoolExecutor(4) as threads:
        results = [threads.submit(logits, model, inputs) for _ in range(8)]
    assert all(torch.equal(result.result(), masked) for result in results)
    assert torch.equal(logits(model, inputs), masked)
    assert {len(layer.mlp.experts.down_proj) for layer in model.model.layers} == {8}


def test_discarding_the_masks_gives_all_experts_back() -> None:
    model, inputs = tiny_moe("qwen3_moe")
    dense = logits(model, inputs)
    prune(model, 0.5, granularity="expert", keep_dense=True)
    MaskStore.of(model).discard(model)
    assert not layers_without_units(model)
    assert torch.equal(logits(model, inputs), dense)


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_pruning_again_only_adds(criterion: str) -> None:
    model, inputs = tiny_moe("olmoe")
    prune(model, 0.25, granularity="expert", criterion=criterion)
    first = dict(MaskStore.of(model).masks)
    prune(model, 0.5, granularity="expert", criterion=criterion, seed=1)
    second = MaskStore.of(model).masks
    assert all(not (second[name] & ~mask).any() for name, mask in first.items())
    masked = logits(model, inputs)
    assert {g.units for g in experts_of(shrink(model))} == {4}
    assert torch.equal(logits(model, inputs), masked)


def test_a_shrunk_model_is_pruned_again(tmp_path: Path) -> None:
    model, inputs = tiny_moe("deepseek_v3")
    shrink(prune(model, 0.25, granularity="expert"))
    assert {g.units for g in experts_of(model)} == {6}
    shrink(prune(model, 0.33, granularity="expert"))
    assert {g.units for g in experts_of(model)} == {4}
    assert model.config.pruned_structure["units"] == {"layers.1.mlp.experts": {"before": 8, "kept": 4}}
    model.save_pretrained(tmp_path)
    assert close(logits(type(model).from_pretrained(tmp_path).eval(), inputs), logits(model, inputs))


def test_as_many_experts_stay_as_a_token_needs() -> None:
    model, inputs = tiny_moe("mixtral", num_experts_per_tok=3)
    with pytest.raises(PlanError, match=r"the budget of .* cannot be met"):
        prune(model, 0.9, granularity="expert")
    shrink(prune(model, 5 / 8, granularity="expert"))
    assert {g.units for g in experts_of(model)} == {3}
    assert logits(model, inputs).isfinite().all()


def test_every_router_group_keeps_as_many() -> None:
    model, inputs = tiny_moe("deepseek_v3", num_experts_per_tok=3)
    (group,) = experts_of(model)
    assert (group.minimum, group.runs) == (6, 2)  # three experts of the one group that a token goes to
    shrink(prune(model, 0.25, granularity="expert", criterion="random"))
    assert logits(model, inputs).isfinite().all()
    with pytest.raises(PlanError, match="cannot be met"):
        prune(tiny_moe("deepseek_v3", num_experts_per_tok=3)[0], 0.5, granularity="expert")


def test_a_masked_model_is_not_saved_with_a_router_that_finds_the_experts_again(tmp_path: Path) -> None:
    model, _ = tiny_moe("mixtral")
    prune(model, 0.5, granularity="expert")
    with pytest.raises(CheckpointError, match=r"experts are switched off.*model\.layers\.0.*call shrink\(\) first"):
        hf_prune.prunable(model).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_nor_do_others_get_its_weights(tmp_path: Path) -> None:
    model, inputs = tiny_moe("mixtral")
    prune(model, 0.5, granularity="expert", criterion="magnitude", keep_dense=True)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    said = r"experts are switched off in model\.layers\.0, .* call shrink\(\) first"
    for masked in (model, copied, pickled):
        with pytest.raises(CheckpointError, match=said):
            masked.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=said):
            masked.state_dict()
    assert not list(tmp_path.glob("*.safetensors"))
    expected = logits(model, inputs)
    shrink(copied).save_pretrained(tmp_path)
    assert close(logits(type(model).from_pretrained(tmp_path).eval(), inputs), expected)
    MaskStore.of(pickled).discard(pickled)
    dense = tiny_moe("mixtral")[0].state_dict()
    assert all(torch.equal(tensor, dense[name]) for name, tensor in pickled.state_dict().items())
    MaskStore.detach(copied)  # of the weights that stayed
    for module in (*copied.modules(), *pickled.modules()):
        assert not module._state_dict_pre_hooks
        assert not module._forward_pre_hooks


@torch.no_grad()
def balanced(model: Any, inputs: Any) -> Any:
    return model(**inputs(), labels=inputs()["input_ids"], output_router_logits=True)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "granitemoe"])
def test_the_loss_that_balances_routers_is_that_of_the_shrunk_model(model_type: str, tmp_path: Path) -> None:
    model, inputs = tiny_moe(model_type, output_router_logits=True)
    dense = balanced(model, inputs)
    assert dense.aux_loss > 0
    prune(model, 0.5, granularity="expert", keep_dense=True)
    masked = balanced(model, inputs)
    shrunk = shrink(copy.deepcopy(model))
    shrunk.save_pretrained(tmp_path)
    for other in (shrunk, type(model).from_pretrained(tmp_path).eval()):
        assert close(balanced(other, inputs).aux_loss, masked.aux_loss)
        assert close(balanced(other, inputs).loss, masked.loss)
    MaskStore.of(model).discard(model)
    assert balanced(model, inputs).loss == dense.loss


def test_a_failure_gives_the_loss_that_balances_routers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_moe("mixtral")
    dense = balanced(model, inputs).loss
    monkeypatch.setattr(MaskStore, "update", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(model, 0.5, granularity="expert")
    assert balanced(model, inputs).loss == dense


def test_layers_do_not_differ_where_the_config_balances_their_routers() -> None:
    model, inputs = tiny_moe("mixtral", output_router_logits=True)
    settings: dict[str, Any] = {"granularity": "expert", "exclude_modules": ["layers.0.mlp.experts"]}
    dense = balanced(model, inputs).loss
    with pytest.raises(PlanError, match=r"layers would keep 4 or 8 experts, and config\.output_router_logits is on"):
        prune(model, 0.5, **settings)
    assert not layers_without_units(model)
    assert balanced(model, inputs).loss == dense
    model.config.output_router_logits = False
    prune(model, 0.5, **settings)
    masked = logits(model, inputs)
    assert torch.equal(logits(shrink(model), inputs), masked)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_moe("mixtral")
    prune(model, 0.25, granularity="expert")
    before = logits(model, inputs)
    monkeypatch.setattr(MaskStore, "update", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(model, 0.5, granularity="expert")
    assert torch.equal(logits(model, inputs), before)
    fresh, inputs = tiny_moe("mixtral")
    before = logits(fresh, inputs)
    with pytest.raises(ZeroDivisionError):
        prune(fresh, 0.5, granularity="expert")
    assert torch.equal(logits(fresh, inputs), before)
    assert not layers_without_units(fresh)


def test_an_interrupted_forward_pass_puts_everything_back() -> None:
    model, inputs = tiny_moe("switch_transformers")
    prune(model, 0.5, granularity="expert")
    masked, shapes = logits(model, inputs), {name: p.shape for name, p in model.named_parameters()}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.encoder.block[1].layer[1].mlp.experts.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model, inputs)
    hook.remove()
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert torch.equal(logits(model, inputs), masked)


def test_layers_can_be_spared_and_then_differ(tmp_path: Path) -> None:
    model, inputs = tiny_moe("mixtral")
    prune(model, 0.5, granularity="expert", exclude_modules=["layers.0.mlp.experts"])
    masked = logits(model, inputs)
    shrink(model)
    assert [g.units for g in experts_of(model)] == [8, 4]
    hf_prune.prunable(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert close(logits(loaded, inputs), masked)
    assert [g.units for g in experts_of(loaded)] == [8, 4]


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "switch_transformers"])
def test_layers_keep_different_numbers_where_experts_compete(model_type: str, tmp_path: Path) -> None:
    model, inputs = tiny_moe(model_type, **({} if model_type != "deepseek_v3" else {"num_hidden_layers": 3}))
    groups = experts_of(model)
    for group in groups[1:]:  # the experts of the first block are worth less than all others
        for name in [p.name for p in group.slices] + [n for ns in group.own_parameters(model, range(8)) for n in ns]:
            model.get_parameter(name).data.mul_(3)
    prune(model, 0.25, granularity="expert", scope="global")
    masked = logits(model, inputs)
    shrink(model)
    kept = [group.units for group in experts_of(model)]
    assert kept == [4, *[8] * (len(groups) - 1)]
    assert torch.equal(logits(model, inputs), masked)
    hf_prune.prunable(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert [group.units for group in experts_of(loaded)] == kept
    assert close(logits(loaded, inputs), masked)


def test_what_cannot_be_removed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    sizes = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    sizes |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 4, "ffn_hidden_size": 24}
    model = LongcatFlashForCausalLM(
        LongcatFlashConfig(
            vocab_size=64, n_routed_experts=8, zero_expert_num=2, moe_topk=2, expert_ffn_hidden_size=20, **sizes
        )
    )
    before = copy.deepcopy(model.state_dict())
    assert not moe_blocks(model)
    assert len(unusable_experts(model)) == 1
    with pytest.raises(PlanError, match=r"no expert of LongcatFlashForCausalLM may go: .* config\.n_routed_experts"):
        prune(model, 0.5, granularity="expert")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _hashing(kinds: list[str]) -> Any:
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8}
    sizes |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "pad_token_id": 0}
    sizes |= {"layer_types": ["sliding_attention"] * 2, "mlp_layer_types": kinds}
    return DeepseekV4ForCausalLM(DeepseekV4Config(**sizes)).eval()


def test_experts_that_a_table_of_tokens_names_stay() -> None:
    """The table has the same shape for any number of experts, but its values are their numbers."""
    assert len(experts_of(_hashing(["moe", "moe"]))) == 2
    model = _hashing(["hash_moe", "moe"])  # one setting counts the experts of both layers
    assert not experts_of(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.gate\.tid2eid .* whole numbers .* config\.n_routed_experts"):
        prune(model, 0.5, granularity="expert")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert any("experts" in group.name for group in find_unit_groups(model) if group.kind == "neuron")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: model.model.layers.__delitem__(1), r"has no model\.layers\.1\.mlp\.\S+, so none"),
        (
            lambda model: setattr(model.model.layers[1], "mlp", torch.nn.Identity()),
            r"has no model\.layers\.1\.mlp\.\S+",
        ),
        (
            lambda model: setattr(
                model.model.layers[0].mlp.experts, "down_proj", torch.nn.Parameter(torch.zeros(6, 32, 24))
            ),
            r"experts\.down_proj of the shape \(6, 32, 24\) has no part for each of 8",
        ),
    ],
)
def test_a_model_that_its_config_does_not_describe_is_refused(change: Any, said: str) -> None:
    model, _ = tiny_moe("mixtral")
    change(model)
    assert not moe_blocks(model)
    with pytest.raises(PlanError, match=said):
        prune(model, 0.5, granularity="expert")


def test_a_class_that_its_config_cannot_build_is_refused() -> None:
    from transformers import MixtralForCausalLM

    class NeedsMore(MixtralForCausalLM):
        def __init__(self, config: Any, more: int) -> None:
            super().__init__(config)
            self.more = more

    model = NeedsMore(tiny_moe("mixtral")[0].config, 1)
    (reason,) = unusable_experts(model)
    assert "NeedsMore cannot be built from its config alone (TypeError" in reason
    with pytest.raises(PlanError, match="NeedsMore cannot be built"):
        prune(model, 0.5, granularity="expert")


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="'fisher' cannot rank experts: expected one of frequency, magnitude, "):
        hf_prune.PruningConfig(granularity="expert", criterion="fisher")
    with pytest.raises(ConfigError, match=r"repair='least_squares' contradicts granularity 'expert'"):
        hf_prune.PruningConfig(granularity="expert", criterion="magnitude", repair="least_squares")
    with pytest.raises(ConfigError, match=r"contradicts granularity 'expert'.*train the shrunk model instead"):
        hf_prune.PruningConfig(granularity="expert", criterion="magnitude", polish="distill")


def test_a_model_without_experts_has_none() -> None:
    from tests.architecture_models import tiny

    model, _ = tiny("llama")
    with pytest.raises(PlanError, match="no expert of LlamaForCausalLM may go: it has no layers with experts"):
        prune(model, 0.5, granularity="expert")
    model = torch.nn.Linear(4, 4)
    with pytest.raises(ArchitectureError, match=re.escape("no entry for")):
        prune(model, 0.5, granularity="expert")


def test_weights_are_calibrated_after_shrinking() -> None:
    model, inputs = tiny_moe("mixtral")
    prune(model, 0.5, granularity="expert")
    before = logits(model, inputs)
    with pytest.raises(PlanError, match=r"experts are switched off in model\.layers\.0, .* call shrink\(\) first"):
        prune(model, 0.5, criterion="wanda", calibration=[inputs()])
    assert torch.equal(logits(model, inputs), before)
    prune(model, 0.5)  # magnitude needs no tokens
    texts = [{"input_ids": (inputs()["input_ids"] * (i + 1)) % 60 + 3} for i in range(20)]
    shrunk = prune(shrink(model), 0.6, criterion="wanda", calibration=texts)
    assert (shrunk.model.layers[0].mlp.experts.down_proj == 0).float().mean() > 0.5
