"""nn.MultiheadAttention packs its projections in one weight, and reads its output projection without calling it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from hf_prune.calibration.input_reader import InputReader
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.planning.plan import targets_of
from tests.models import fill


class Attention(nn.Module):
    """Attention of torch, or the same with a Linear for each projection."""

    def __init__(self, packed: bool, **settings) -> None:
        super().__init__()
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(8, 2, batch_first=True, **settings)
        nn.init.normal_(attention.in_proj_bias)
        self.packed = packed
        self.widths = settings.get("kdim", 8), settings.get("vdim", 8)
        if packed:
            self.attention = attention
        else:
            self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            same = settings.get("kdim") is None
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            weights = attention.in_proj_weight.chunk(3) if same else [getattr(attention, name) for name in names]
            for part, weight, bias in zip(self.parts, weights, attention.in_proj_bias.chunk(3), strict=False):
                part.weight, part.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
            self.parts[3].load_state_dict(attention.out_proj.state_dict())

    def forward(self, query, memory):
        key, value = (memory[..., :width] for width in self.widths)
        if self.packed:
            return SimpleNamespace(logits=self.attention(query, key, value, need_weights=False)[0])
        q, k, v = (part(x) for part, x in zip(self.parts, (query, key, value), strict=False))
        q, k, v = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return SimpleNamespace(logits=self.parts[3](mixed))


def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        {"query": torch.randn(2, 3, 8, generator=generator), "memory": torch.randn(2, 5, 8, generator=generator)}
        for _ in range(4)
    ]


@pytest.mark.parametrize("apart", [{}, {"kdim": 6, "vdim": 4}])
@pytest.mark.parametrize(
    "settings",
    [{"criterion": "wanda"}, {"criterion": "sparsegpt"}, {"criterion": "magnitude", "repair": "least_squares"}],
    ids=lambda settings: "-".join(settings.values()),
)
def test_like_four_linears(settings, apart):
    if apart and "repair" in settings:
        pytest.skip("one bias for three projections that are weights of their own stays as it is in a repair")
    model, listed = Attention(True, **apart), Attention(False, **apart)
    for each in (model, listed):
        prune(each, 0.5, calibration=batches(), **settings)
    attention = model.attention
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    found = [getattr(attention, name) for name in names] if apart else attention.in_proj_weight.chunk(3)
    for weight, part in zip((*found, attention.out_proj.weight), listed.parts, strict=True):
        assert torch.equal(weight == 0, part.weight == 0)
        assert torch.allclose(weight, part.weight, atol=1e-4)
    assert torch.allclose(attention.in_proj_bias, torch.cat([part.bias for part in listed.parts[:3]]), atol=1e-4)
    assert torch.allclose(model(**batches()[0]).logits, listed(**batches()[0]).logits, atol=1e-4)


@pytest.mark.parametrize("target", ["out_proj", "in_proj_weight"])
def test_one_of_its_projections_alone(target):
    """Reached, and decided on as a Linear by itself; no warning says otherwise."""
    model, listed = Attention(True), Attention(False)
    prune(model, 0.5, criterion="wanda", calibration=batches(), target_modules=[target])
    names = ["parts.3"] if target == "out_proj" else ["parts.0", "parts.1", "parts.2"]
    prune(listed, 0.5, criterion="wanda", calibration=batches(), target_modules=names)
    found = [*model.attention.in_proj_weight.chunk(3), model.attention.out_proj.weight]
    for weight, part in zip(found, listed.parts, strict=True):
        assert torch.equal(weight == 0, part.weight == 0)
    assert torch.allclose(model(**batches()[0]).logits, listed(**batches()[0]).logits, atol=1e-5)


def test_calibration_changes_no_output_and_reaches_every_projection():
    model = fill(
        SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
            )
        )
    ).eval()
    data = [{"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(i))} for i in range(3)]
    expected = model(**data[0]).pooler_output
    plan = make_plan(model, PruningConfig(0.5, criterion="wanda"))
    with InputReader(model, targets_of(plan), data) as reader, torch.no_grad():
        assert torch.allclose(reader.forward(data[0]).pooler_output, expected, atol=1e-6)
        reader.order()
        reader.gather(reader.targets, frozenset({"input_norm"}))
        tokens = {name.rpartition("head.")[2]: numbers for name, numbers in reader.tokens.items() if "head." in name}
    # One probe for each of 6 images, and the 4 patches of each.
    assert tokens["attention.in_proj_weight"] == (6, 24, 24)
    assert tokens["attention.out_proj.weight"] == (6,)
    before = copy.deepcopy(model.state_dict())
    prune(model, 0.5, criterion="wanda", objective="loss", calibration=data)
    name = next(name for name in before if name.endswith("in_proj_weight"))
    assert [int((part == 0).sum()) for part in model.state_dict()[name].chunk(3)] == [128] * 3
