"""Units of a model that is nobody's family are found and proven: masked == shrunk == reloaded."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    WhisperConfig,
    WhisperForAudioClassification,
)

from hf_prune import describe_units, prunable
from hf_prune.architectures.bypass import bypass
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.architectures.memory import text_of
from hf_prune.architectures.small_models import small_config
from hf_prune.errors import ArchitectureError, PlanError
from hf_prune.structured import shrink_record
from tests.architectures.custom_models import OwnConfig, OwnModel
from tests.architectures.custom_places import (
    PLACED,
    NoNumbers,
    OfTorch,
    Pairs,
    PlaceConfig,
    Rigid,
    RigidConfig,
)

INPUTS = {"input_ids": torch.arange(20).view(2, 10)}
PAIRS = [("grouped", "gated"), ("per_head", "interleaved"), ("thirds", "halves")]


def model(mixer, network):
    torch.manual_seed(0)
    return prunable(OwnModel(OwnConfig(mixer=mixer, network=network)).eval())


def test_a_small_config_keeps_the_settings_of_custom_code():
    small = small_config(OwnConfig(mixer="per_head", network="halves", ff=80))
    assert (small.mixer, small.network) == ("per_head", "halves")


@pytest.mark.parametrize(("mixer", "network"), PAIRS)
@torch.no_grad()
def test_masked_is_shrunk_is_reloaded(mixer, network, tmp_path):
    dense = model(mixer, network)
    heads = 4 if mixer == "grouped" else 8
    for kind, units in (("head", heads), ("neuron", 96), ("layer", 3)):
        pruned = copy.deepcopy(dense).prune(0.5, granularity=kind)
        masked = pruned(**INPUTS).logits
        assert not torch.equal(masked, dense(**INPUTS).logits)
        pruned.shrink()
        assert pruned.num_parameters() < dense.num_parameters()
        torch.testing.assert_close(pruned(**INPUTS).logits, masked, atol=1e-6, rtol=1e-5)
        pruned.save_pretrained(tmp_path / kind)
        reloaded = OwnModel.from_pretrained(tmp_path / kind).eval()
        torch.testing.assert_close(reloaded(**INPUTS).logits, masked, atol=1e-6, rtol=1e-5)
        assert str(units) in str(describe_units(dense))
    assert "found and proven" in str(describe_units(dense))


@pytest.mark.parametrize("cls", PLACED, ids=lambda cls: cls.__name__)
@torch.no_grad()
def test_units_are_found_wherever_they_stand(cls, tmp_path):
    torch.manual_seed(0)
    dense = prunable(cls(PlaceConfig()).eval())
    for kind, places in zip(("head", "neuron"), PLACED[cls], strict=True):
        assert len([group for group in find_unit_groups(dense) if group.kind == kind]) == places
        pruned = copy.deepcopy(dense).prune(0.5, granularity=kind, criterion="magnitude", scope="global")
        masked = pruned(**INPUTS)[0]
        assert not torch.allclose(masked, dense(**INPUTS)[0])
        pruned.shrink()
        assert pruned.num_parameters() < dense.num_parameters()
        torch.testing.assert_close(pruned(**INPUTS)[0], masked, atol=1e-6, rtol=1e-5)
        pruned.save_pretrained(tmp_path / kind)
        reloaded = cls.from_pretrained(tmp_path / kind).eval()
        torch.testing.assert_close(reloaded(**INPUTS)[0], masked, atol=1e-6, rtol=1e-5)


def test_layers_that_are_not_run_as_a_whole_stay():
    description = describe_units(Pairs(PlaceConfig()))
    assert description.refused["layers"] == "its layers stay: a layer is not run as a whole, but piece by piece"
    assert description.layers == {"layers": (3, 0)}


@torch.no_grad()
def test_a_model_of_which_no_smaller_one_runs_is_tried_itself():
    torch.manual_seed(0)
    pruned = prunable(Rigid(RigidConfig()).eval()).prune(0.5, granularity="neuron", criterion="magnitude")
    rows = torch.randn(3, 10)
    masked = pruned(rows)["logits"]
    pruned.shrink()
    assert pruned.up.weight.shape == (50, 40)
    torch.testing.assert_close(pruned(rows)["logits"], masked)


def test_outputs_that_are_no_numbers_prove_nothing():
    dense = prunable(NoNumbers(RigidConfig()).eval())
    assert "its outputs are no numbers" in str(describe_units(dense))
    with pytest.raises(ArchitectureError, match="its outputs are no numbers"):
        dense.prune(0.5, granularity="neuron")


def test_heads_of_torch_stay_and_its_neurons_go():
    description = describe_units(OfTorch(PlaceConfig(dim=48, heads=4)))
    assert [place.kind for place in description.units] == ["neuron"]
    assert "runs only with heads that are as wide as its inputs" in description.refused["encoder.layers.0.self_attn"]


def test_layers_that_the_table_names_stay_where_the_head_counts_them():
    sizes = {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 60}
    layers = {"encoder_layers": 3, "num_hidden_layers": 3, "decoder_layers": 3, "pad_token_id": 0}
    for weighted in (False, True):
        config = WhisperConfig(
            **sizes, **layers, encoder_ffn_dim=48, decoder_ffn_dim=48, use_weighted_layer_sum=weighted
        )
        dense = prunable(WhisperForAudioClassification(config).eval())
        if weighted:  # a weight for each layer
            with pytest.raises(PlanError, match=r"the layers of encoder.layers stay: the code does not run without"):
                dense.prune(0.4, granularity="layer")
        else:
            assert dense.prune(0.4, granularity="layer").shrink().config.encoder_layers == 2


def test_what_cannot_go_is_explained():
    config = Olmo2Config(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=50, intermediate_size=64, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    dense = prunable(Olmo2ForCausalLM(config).eval())
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    with pytest.raises(
        PlanError, match=r"no head of Olmo2ForCausalLM may go: .*o_proj: .*the code does not run without them"
    ):
        dense.prune(0.5, granularity="head")  # a norm is taken over all of its queries
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize("family", ["falcon", "gpt_bigcode"])
@torch.no_grad()
def test_query_heads_that_share_one_key_go_singly(family, tmp_path):
    sizes = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    torch.manual_seed(0)
    if family == "falcon":
        dense = FalconForCausalLM(FalconConfig(**sizes, multi_query=True, ffn_hidden_size=64))
    else:
        dense = GPTBigCodeForCausalLM(GPTBigCodeConfig(**sizes, multi_query=True, n_inner=64))
    pruned = prunable(dense.eval()).prune(0.5, granularity="head", criterion="random")
    assert [group.units for group in find_unit_groups(pruned) if group.kind == "head"] == [4, 4]
    masked = pruned(**INPUTS).logits
    pruned.shrink()
    assert [group.units for group in find_unit_groups(pruned) if group.kind == "head"] == [2, 2]
    fused = next(p for n, p in pruned.named_parameters() if n.endswith(("query_key_value.weight", "c_attn.weight")))
    assert fused.shape == (2 * 8 + 2 * 8, 32)  # two queries, the key and the value
    torch.testing.assert_close(pruned(**INPUTS).logits, masked, atol=1e-6, rtol=1e-5)
    pruned.save_pretrained(tmp_path)
    reloaded = type(dense).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(reloaded(**INPUTS).logits, masked, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_model_with_one_layer_left_is_saved(tmp_path):
    config = Mamba2Config(
        hidden_size=32, num_hidden_layers=2, vocab_size=50, num_heads=4, head_dim=16, state_size=8, n_groups=1
    )
    torch.manual_seed(0)
    pruned = prunable(Mamba2ForCausalLM(config).eval()).prune(0.5, granularity="layer")
    masked = pruned(**INPUTS).logits
    pruned.shrink()
    assert pruned.config.num_hidden_layers == 1
    pruned.save_pretrained(tmp_path)
    assert torch.equal(Mamba2ForCausalLM.from_pretrained(tmp_path).eval()(**INPUTS).logits, masked)


@torch.no_grad()
def test_three_heads_are_left_and_the_config_is_written_from_what_was_known(tmp_path):
    config = Phi3Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2, intermediate_size=48,
        vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    pruned = prunable(Phi3ForCausalLM(config).eval()).prune(0.25, granularity="head")
    masked = pruned(**INPUTS).logits
    pruned.shrink()
    assert pruned.config.num_attention_heads == 3
    pruned.save_pretrained(tmp_path)
    reloaded = prunable(Phi3ForCausalLM.from_pretrained(tmp_path).eval())
    torch.testing.assert_close(reloaded(**INPUTS).logits, masked, atol=1e-6, rtol=1e-5)
    assert "heads" in str(describe_units(reloaded))


@pytest.mark.parametrize("gone", [0, 2])
def test_the_config_tells_sizes_also_when_layers_were_removed(gone, tmp_path):
    torch.manual_seed(0)
    pruned = prunable(OwnModel(OwnConfig()).eval()).prune(0.5, granularity="neuron")
    bypass(pruned.stack[gone])
    pruned.shrink()
    assert (pruned.config.depth, pruned.config.ff) == (2, 48)
    pruned.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@torch.no_grad()
def test_sizes_stay_out_of_a_config_by_which_the_units_are_not_found_again(monkeypatch, tmp_path):
    torch.manual_seed(0)
    pruned = prunable(OwnModel(OwnConfig()).eval()).prune(0.5, granularity="neuron")
    pruned.prune(0.5, granularity="head", exclude_modules=r"stack\.[12]\..*")  # of which the config can tell nothing
    masked = pruned(**INPUTS).logits
    monkeypatch.setattr(shrink_record, "find_unit_groups", lambda model: [])
    pruned.shrink()
    assert (pruned.config.ff, pruned.config.nh) == (OwnConfig().ff, OwnConfig().nh)
    pruned.save_pretrained(tmp_path)
    assert torch.equal(OwnModel.from_pretrained(tmp_path).eval()(**INPUTS).logits, masked)


def test_a_setting_of_two_kinds_of_units_is_what_it_was_where_neither_is_built(monkeypatch):
    model = OwnModel(OwnConfig())
    (group, *_) = [group for group in find_unit_groups(model) if group.kind == "neuron"]
    groups = [dataclasses.replace(group, units=48), dataclasses.replace(group, units=24, config=("ff", "vocab"))]
    groups[1] = dataclasses.replace(groups[1], per_unit=(1, 1))
    monkeypatch.setattr(shrink_record, "_is_built", lambda *_: False)
    shrink_record.simplify_config(model, groups)
    assert (model.config.ff, model.config.vocab) == (96, 100)


def test_configs_that_say_something_else_inside_are_told_apart():
    plain, other = (OwnConfig(parts={"dtype": dtype}) for dtype in ("a", "b"))
    assert text_of(plain) != text_of(other)
    assert text_of(OwnConfig(dtype="float32")) == text_of(OwnConfig(dtype="bfloat16"))


class LetterConfig(OwnConfig):
    model_type = "in_letters"
    depth = property(lambda self: self.L, lambda self, value: None)

    def __init__(self, L=3, **kwargs):
        self.L = L
        super().__init__(**kwargs)


class LetterModel(OwnModel):
    config_class = LetterConfig


def test_any_attribute_of_the_config_may_count_the_layers():
    torch.manual_seed(0)
    pruned = prunable(LetterModel(LetterConfig(num_labels=3)).eval()).prune(0.33, granularity="layer")
    masked = pruned(**INPUTS).logits
    pruned.shrink()
    assert (pruned.config.L, pruned.config.num_labels) == (2, 3)
    torch.testing.assert_close(pruned(**INPUTS).logits, masked)


def test_a_config_in_words_of_its_own_builds_nothing_large():
    class Vast(OwnModel):
        def __init__(self, config):
            super().__init__(config)
            self.wide = torch.nn.Linear(config.breadth, config.breadth)

    with torch.device("meta"):
        large = Vast(OwnConfig(breadth=40_000))
    assert "40,000" not in str(describe_units(large))
    assert "are not small" in str(describe_units(large))


def test_heads_of_which_a_part_is_not_saved_stay():
    sloped = model("sloped", "gated")
    with pytest.raises(PlanError, match=r"mix\.slopes has a part for each of these units and is not saved"):
        sloped.prune(0.5, granularity="head", criterion="magnitude")
    sloped.prune(0.5, granularity="neuron", criterion="magnitude")


def test_what_starts_behind_a_closed_gate_is_proven():
    late = model("per_head", "late")
    assert [block.ffw.alpha.item() for block in late.stack] == [1, 0, 1]  # what the proof must not rely on
    with pytest.raises(PlanError, match="no neuron of OwnModel may go"):
        late.prune(0.5, granularity="neuron", criterion="magnitude")
