"""Neurons of experts by every criterion of units, against gates that are written into a list of experts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_prune import MaskStore, PlanError, prune
from hf_prune.architectures.kinds.registry import kind_named
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.calibration.predictions import sampled_prediction, token_mask
from hf_prune.criteria.base import derived_seed
from hf_prune.structured.gate_statistics import gate_statistics
from tests.architectures.custom_mixtures import mixture
from tests.models import VOCAB
from tests.moe_families import tiny_moe
from tests.moe_models import ListOfExperts, tiny_mixture, twin

# One by one, interleaved with biases, all at once, without a gate.
FAMILIES = ["mixtral", "gpt_oss", "llama4", "nemotron_h"]


def batches(number: int = 2, size: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, VOCAB, (size, 7), generator=generator)} for _ in range(number)]


def packed_neurons(model: Any) -> list[UnitGroup]:
    return [group for group in kind_named("neuron").groups(model) if group.choices]


def gated(family: str, data: list[dict[str, Tensor]], seed: int) -> dict[str, list[Tensor]]:
    """(batch, experts, neurons) gradients of gates on each expert's neurons in a twin, batch by batch."""
    model = twin(family)
    lists = {name: m for name, m in model.named_modules() if isinstance(m, ListOfExperts)}
    found: dict[str, list[Tensor]] = {name: [] for name in lists}
    for index, batch in enumerate(data):
        size, length = batch["input_ids"].shape
        gates = {}
        for name, module in lists.items():
            gate = torch.ones(size, len(module.second), module.second[0].in_features, requires_grad=True)
            gates[name] = gate

            def forward(
                x: Tensor, *args: Any, module: Any = module, gate: Tensor = gate, length: int = length
            ) -> Tensor:
                hooks = []
                for number, linear in enumerate(module.second):

                    def pre(_: Any, inputs: Any, number: int = number) -> Any:
                        return (inputs[0] * gate[rows[number] // length, number],)

                    hooks.append(linear.register_forward_pre_hook(pre))
                rows = {}
                for number in range(len(module.second)):
                    if module.batched:
                        each = len(x) // len(module.second)
                        rows[number] = x[number * each : (number + 1) * each].ne(0).any(-1).nonzero().squeeze(1)
                    else:
                        rows[number] = torch.where(args[0] == number)[0]
                try:
                    return ListOfExperts.forward(module, x, *args)
                finally:
                    for hook in hooks:
                        hook.remove()

            module.forward = forward
        generator = torch.Generator().manual_seed(derived_seed(seed, index))
        value = sampled_prediction(model(**batch), token_mask(model, batch), generator)
        gradients = torch.autograd.grad(value, list(gates.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(gates, gradients, strict=True):
            found[name].append(gradient)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_of_packed_experts_are_those_of_a_list(family: str) -> None:
    model, data = tiny_mixture(family), batches()
    groups = packed_neurons(model)
    assert groups
    found = gate_statistics(model, groups, data, seed=5)
    expected = gated(family, data, 5)
    for group in groups:
        name = group.consumers[0].name.rpartition(".")[0]
        each = torch.cat(expected[name])  # (examples, experts, neurons)
        fisher, absolute = each.square().mean(0), each.abs().mean(0)
        assert found[group.name].fisher.shape == (group.choices, group.units)
        assert torch.allclose(found[group.name].fisher.float(), fisher, rtol=1e-3, atol=1e-5 * float(fisher.max()))
        assert torch.allclose(
            found[group.name].absolute.float(), absolute, rtol=1e-3, atol=1e-5 * float(absolute.max())
        )
        assert [*found[group.name].missed] == (absolute.sum(1) == 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
def test_each_expert_loses_the_neurons_that_count_least(criterion: str) -> None:
    model, data = tiny_mixture("mixtral"), batches()
    groups = packed_neurons(model)
    statistics = gate_statistics(model, groups, data)
    prune(model, 0.6, granularity="neuron", criterion=criterion, calibration=data)
    for group in groups:
        piece = group.consumers[0]
        kept = piece.by_unit(MaskStore.of(model).masks[piece.name], group.units, group.choices).all(-1)
        scores = statistics[group.name].fisher if criterion == "fisher" else statistics[group.name].absolute
        assert set(kept.sum(1).tolist()) == {8}
        for expert in range(group.choices):
            assert scores[expert][kept[expert]].min() >= scores[expert][~kept[expert]].max()


def test_reconstruction_spares_what_no_other_neuron_of_the_expert_explains() -> None:
    """Of twins in one expert the second can go for nothing, and another expert keeps both of its own."""
    model, data = tiny_mixture("mixtral"), batches(6, 16)
    half = 24
    with torch.no_grad():
        for layer in model.model.layers:
            packed = layer.mlp.experts
            for expert in range(4):
                for copied in range(12):  # 12 to 23 repeat 0 to 11, but in the first expert every second neuron does
                    source, goal = (copied, 12 + copied) if expert else (2 * copied, 2 * copied + 1)
                    packed.gate_up_proj[expert, goal] = packed.gate_up_proj[expert, source]
                    packed.gate_up_proj[expert, half + goal] = packed.gate_up_proj[expert, half + source]
    groups = packed_neurons(model)
    prune(model, 1 / 3, granularity="neuron", criterion="reconstruction", calibration=data)
    for group in groups:
        piece = group.consumers[0]
        kept = piece.by_unit(MaskStore.of(model).masks[piece.name], group.units, group.choices).all(-1)
        assert set(kept.sum(1).tolist()) == {16}
        pairs = [kept[0].view(12, 2), *(row.view(2, 12).t() for row in kept[1:])]
        assert all(pair.any(1).all() for pair in pairs)  # no neuron is lost with its twin


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "reconstruction"])
def test_experts_without_tokens_lose_by_magnitude(criterion: str) -> None:
    model, data = tiny_mixture("mixtral"), batches()
    with torch.no_grad():
        for layer in model.model.layers:  # the last expert is never chosen
            layer.mlp.gate.weight[-1] = 0
            layer.mlp.gate.weight[:-1] = layer.mlp.gate.weight[:-1].abs()
            layer.post_attention_layernorm.weight.zero_()
        for layer in model.model.layers:
            layer.mlp.gate.weight[:] = torch.arange(4.0).flip(0)[:, None]
            layer.post_attention_layernorm.weight.fill_(1)
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, args, out: _without_last(out)) for layer in model.model.layers
    ]
    groups = packed_neurons(model)
    squares = {
        group.name: sum(
            piece.by_unit(model.get_parameter(piece.name).detach(), group.units, 4).square().sum(-1)
            for piece in group.slices
        )
        for group in groups
    }
    with pytest.warns(UserWarning, match="saw no calibration token"):
        prune(model, 0.6, granularity="neuron", criterion=criterion, calibration=data)
    for hook in hooks:
        hook.remove()
    for group in groups:
        piece = group.consumers[0]
        kept = piece.by_unit(MaskStore.of(model).masks[piece.name], group.units, 4).all(-1)[3]
        assert squares[group.name][3][kept].min() >= squares[group.name][3][~kept].max()


def _without_last(out: Any) -> Any:
    """The choice of a router, with the first expert in place of the last."""
    logits, weights, chosen = out
    return logits, weights, torch.where(chosen == 3, 0, chosen)


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "reconstruction"])
@pytest.mark.parametrize("name", ["listed", "jetmoe", "dbrx"])
@pytest.mark.filterwarnings("ignore:.*calibration token:UserWarning")
def test_every_criterion_takes_lists_and_other_layouts(name: str, criterion: str) -> None:
    model, inputs = (lambda made: (made[0], made[1]()))(tiny_moe(name)) if name != "listed" else mixture(name)
    data = [{"input_ids": (inputs["input_ids"] * (i + 1) + i) % 60 + 3} for i in range(3)]
    prune(model, 0.5, granularity="neuron", criterion=criterion, calibration=data)
    masks = MaskStore.of(model).masks
    assert masks
    assert model(**inputs).logits.isfinite().all()


def test_packed_experts_of_a_class_that_nobody_knows_are_not_watched() -> None:
    model, inputs = mixture("packed")
    with pytest.raises(PlanError, match=r"neurons of stack\.0\.moe\.down cannot be watched.*register_packed"):
        prune(model, 0.5, granularity="neuron", criterion="fisher", calibration=[inputs])
    assert model(**inputs).logits.isfinite().all()
