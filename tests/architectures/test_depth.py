"""Code that differs in later layers, which a small model of a few layers has not, is not pruned as if it did not."""

from __future__ import annotations

import pytest
import torch
from transformers import RecurrentGemmaConfig, RecurrentGemmaModel
from transformers.modeling_outputs import CausalLMOutput

from hf_prune import PlanError, prunable, prune
from hf_prune.architectures.discovery import depth
from hf_prune.architectures.discovery.find import discover
from hf_prune.architectures.discovery.sample import make_sample, plain_surroundings
from hf_prune.architectures.small_models import small_config
from tests.architectures.custom_mixtures import MixConfig, MixModel, NormedScores, PackedExperts
from tests.architectures.custom_models import Interleaved, OwnConfig, OwnModel


class LateGate(OwnModel):
    """Gates come first, but lie among the values from the fifth layer on."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.stack[4:]:
            block.ffw.__class__ = Interleaved


class OnlyItsDepth(LateGate):
    """Runs with few layers, or with more than those that are tried, but not as deep as it is."""

    def forward(self, input_ids=None, **kwargs):
        if len(self.stack) == self.config.depth == 8:
            raise ValueError("eight layers")
        return super().forward(input_ids, **kwargs)


class ReadsTheSixth(OwnModel):
    """Adds the outputs of the sixth layer at the end."""

    def forward(self, input_ids=None, **kwargs):
        x, states = self.tok(input_ids), []
        for block in self.stack:
            states.append(x := block(x))
        return CausalLMOutput(logits=self.head(self.fin(x + states[min(6, len(states)) - 1])))


def config(layers: int = 8) -> OwnConfig:
    return OwnConfig(depth=layers, network="halves")


def kinds(cls: type[OwnModel], layers: int = 8) -> set[str]:
    (stack,) = discover(cls(config(layers)).eval()).stacks
    return {units.kind for units in stack.units} | ({"layer"} if stack.config else set())


def test_what_holds_of_every_layer_stays_found():
    assert kinds(OwnModel) == {"head", "neuron", "layer"}
    assert small_config(config()).depth == 2
    assert kinds(LateGate, 4) == {"head", "neuron", "layer"}


def test_neurons_of_another_layout_in_later_layers_stay():
    with pytest.raises(PlanError, match="in a model of 8 layers, outputs are others without them than with zeros"):
        prunable(LateGate(config()).eval()).prune(0.5, granularity="neuron", criterion="magnitude")
    assert "neuron" not in kinds(LateGate)


def test_layers_stay_where_code_picks_the_states_of_a_later_one():
    assert kinds(ReadsTheSixth) == {"head", "neuron"}


def test_layers_of_kinds_that_were_not_proven_stay_where_no_deep_model_runs():
    with plain_surroundings():
        (stack,) = discover(OnlyItsDepth(config(4)).eval()).stacks
        kept, refused = depth.stacks_at_depth(OnlyItsDepth, config(), (stack,))
        assert not kept[0].units
        assert not kept[0].config
        assert "layer 4 has attributes that no layer of a small model has" in refused["stack"]


def test_layers_beyond_those_that_are_tried_must_be_of_their_kinds(monkeypatch):
    monkeypatch.setattr(depth, "MOST_LAYERS", 4)
    monkeypatch.setattr(depth, "_AT_DEPTH", {})
    assert kinds(OwnModel) == {"head", "neuron", "layer"}
    with plain_surroundings():
        stacks = discover(LateGate(config(4)).eval()).stacks
        kept, refused = depth.stacks_at_depth(LateGate, config(), stacks)
    assert refused
    assert not kept[0].units


def test_a_model_that_multiplies_rounding_errors_proves_nothing():
    with plain_surroundings():
        sample = make_sample(OwnModel, small_config(config()))
        assert depth.is_steady(sample)
        with torch.no_grad():
            sample.model.head.weight.mul_(1e30)
            sample.model.head.register_forward_hook(lambda _, args, output: output.sin())
        assert not depth.is_steady(sample)


class LateExperts(MixModel):
    """Mixtures that score or multiply otherwise from the third layer on."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.stack[2:]:
            block.moe.__class__ = {"listed": NormedScores, "packed": Halved}[config.block]


class Halved(PackedExperts):
    """What the first half of the neurons adds up to counts for all."""

    def forward(self, x):
        half = self.up.shape[-1] // 2
        weights = self.moe_gate(x).softmax(-1)
        hidden = torch.einsum("th,ehi->tei", x, self.up).tanh()
        hidden = hidden + hidden[..., :half].mean(-1, keepdim=True)
        return torch.einsum("tei,eih,te->th", hidden, self.down, weights)


@pytest.mark.parametrize(("block", "granularity"), [("listed", "expert"), ("packed", "neuron")])
def test_mixtures_that_differ_in_later_layers_stay(block, granularity):
    model = LateExperts(MixConfig(block=block, depth=4)).eval()
    with pytest.raises(PlanError, match="in a model with 4 layers of them, outputs are others"):
        prune(model, 0.5, granularity=granularity, criterion="magnitude")
    prune(LateExperts(MixConfig(block=block, depth=2)).eval(), 0.5, granularity=granularity, criterion="magnitude")


def test_layers_that_hold_the_state_of_a_recurrence_can_be_removed():
    """Which a pass leaves there, and a layer that has not run has not."""
    config = RecurrentGemmaConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, lru_width=32,
        attention_window_size=16,
    )  # fmt: skip
    model = prunable(RecurrentGemmaModel(config)).eval()
    prune(model, 0.3, granularity="layer", criterion="magnitude")
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).last_hidden_state
        model.shrink()
        assert len(model.layers) == 2
        torch.testing.assert_close(model(tokens, use_cache=False).last_hidden_state, expected)
