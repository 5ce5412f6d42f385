"""Units of a model that is nobody's family are found and proven: masked == shrunk == reloaded."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, Mamba2Config, Mamba2ForCausalLM, Phi3Config, Phi3ForCausalLM

from hf_prune import describe_units, prunable
from hf_prune.architectures.small_models import small_config
from hf_prune.errors import PlanError
from tests.architectures.custom_models import OwnConfig, OwnModel

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


def test_what_cannot_go_is_explained():
    config = FalconConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=50, multi_query=True, ffn_hidden_size=64
    )
    dense = prunable(FalconForCausalLM(config).eval())
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    with pytest.raises(PlanError, match=r"no head of FalconForCausalLM may go: none was found.*share one key"):
        dense.prune(0.5, granularity="head")  # all of its heads share one key
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


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


def test_a_config_in_words_of_its_own_builds_nothing_large():
    class Vast(OwnModel):
        def __init__(self, config):
            super().__init__(config)
            self.wide = torch.nn.Linear(config.breadth, config.breadth)

    with torch.device("meta"):
        large = Vast(OwnConfig(breadth=40_000))
    assert "40,000" not in str(describe_units(large))
    assert "are not small" in str(describe_units(large))
