"""Code that does something else in wide layers, which a small model has not, is not pruned as if it did not."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from hf_prune import PlanError, prunable
from hf_prune.architectures.discovery.find import discover
from hf_prune.architectures.small_configs import small_config
from tests.architectures.custom_models import OwnConfig, OwnModel


class Sized(OwnConfig):
    """Says its sizes in the usual words."""

    model_type = "sized"

    def __init__(self, hidden_size=64, intermediate_size=96, n_layers=2, **kwargs):
        self.hidden_size, self.intermediate_size, self.n_layers = hidden_size, intermediate_size, n_layers
        super().__init__(
            **{"mixer": "thirds"} | kwargs | {"width": hidden_size, "ff": intermediate_size, "depth": n_layers}
        )


class Network(torch.nn.Module):
    """Squares all neurons but the first hundred."""

    def __init__(self, c, number):
        super().__init__()
        self.up, self.down = torch.nn.Linear(c.width, c.ff), torch.nn.Linear(c.ff, c.width)
        self.i, self.limit = number, c.breadth

    def forward(self, x):
        hidden = self.up(x).relu()
        return self.down(torch.cat([hidden[..., : self.limit], hidden[..., self.limit :] ** 2], -1))


class SizedModel(OwnModel):
    config_class = Sized

    def __init__(self, config):
        super().__init__(config)
        for number, block in enumerate(self.stack):
            block.ffw = Network(config, number)


class ScaledByNumber(SizedModel):
    """Divides what a layer adds by the layer's own number."""

    def forward(self, input_ids=None, **kwargs):
        x = self.tok(input_ids)
        for block in self.stack:
            x = x + (block(x) - x) / (block.ffw.i + 1)
        return CausalLMOutput(logits=self.head(self.fin(x)))


def model(cls=SizedModel, **settings):
    torch.manual_seed(0)
    return cls(Sized(**settings)).eval()


def kinds(found):
    (stack,) = found.stacks
    return {units.kind for units in stack.units} | ({"layer"} if stack.config else set())


def test_a_config_may_keep_its_widths():
    config = Sized(hidden_size=192, intermediate_size=320, n_layers=5, vocab_size=1000)
    wide = small_config(config, widths=True)
    assert (wide.hidden_size, wide.intermediate_size, wide.n_layers, wide.vocab_size) == (192, 320, 2, 256)
    assert small_config(config).intermediate_size < 192


def test_neurons_that_a_wide_layer_tells_apart_stay():
    wide = model(hidden_size=128, intermediate_size=256, breadth=150)
    found = discover(wide)
    assert kinds(found) == {"head", "layer"}
    assert "in a model of its widths, outputs are others" in found.refused["stack.*.ffw.down"]
    with pytest.raises(PlanError, match=r"no neuron of SizedModel may go: stack\.\*\.ffw\.down: neurons were found"):
        prunable(wide).prune(0.5, granularity="neuron", criterion="magnitude")
    assert kinds(discover(model(hidden_size=128, intermediate_size=256, breadth=1000))) == {"head", "neuron", "layer"}


def test_the_number_of_a_layer_may_have_any_name_and_may_matter():
    found = discover(model(ScaledByNumber, breadth=1000, n_layers=4))
    assert "outputs are others" in found.refused["stack"]
    with pytest.raises(PlanError, match="no layer of ScaledByNumber may go: stack: its layers stay") as error:
        prunable(model(ScaledByNumber, breadth=1000, n_layers=4)).prune(0.5, granularity="layer", criterion="magnitude")
    assert "neuron" not in str(error.value)


class Split(torch.nn.Module):
    """Gate and value in one matrix, parted by a tuple of sizes."""

    def __init__(self, c):
        super().__init__()
        self.dims = (c.ff, c.ff)
        self.up, self.down = torch.nn.Linear(c.width, 2 * c.ff), torch.nn.Linear(c.ff, c.width)

    def forward(self, x):
        gate, value = self.up(x).split(self.dims, -1)
        return self.down(gate.sigmoid() * value)


class SplitModel(SizedModel):
    def __init__(self, config):
        super().__init__(config)
        for block in self.stack:
            block.ffw = Split(config)


@torch.no_grad()
def test_sizes_in_a_tuple_follow_the_units():
    inputs = torch.arange(20).view(2, 10)
    pruned = prunable(model(SplitModel)).prune(0.5, granularity="neuron", criterion="magnitude", scope="layer")
    masked = pruned(inputs).logits
    pruned.shrink()
    assert [block.ffw.dims for block in pruned.stack] == [(48, 48)] * 2
    torch.testing.assert_close(pruned(inputs).logits, masked, atol=1e-5, rtol=1e-5)
