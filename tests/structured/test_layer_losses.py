"""The greedy search for layers: as by brute force, on any architecture, with the model left as it was."""

import pytest
import torch

from hf_prune import ConfigError, PruningConfig, prune, shrink
from hf_prune.architectures.bypass import bypass, bypassed_layers, restore
from hf_prune.architectures.kinds.registry import kind_named
from hf_prune.structured import layer_losses as searched
from hf_prune.structured.gate_statistics import prediction_change
from hf_prune.structured.layer_losses import greedy_layer_losses
from tests.architecture_models import tiny
from tests.models import assert_unchanged, snapshot


def batches_for(inputs):
    given = inputs()
    return [given, {k: v.roll(1, -1) if k == "input_ids" else v for k, v in given.items()}]


def removable(model):
    names = kind_named("layer").removable_layers(model, lambda name: False)
    return {name: model.get_submodule(name) for name in names}


@torch.no_grad()
def by_brute_force(model, layers, batches, most):
    """What each removal adds, every candidate run in full."""
    expected = [model(**batch).logits for batch in batches]
    count = sum(len(logits) for logits in expected)
    gone, before, losses = [], 0.0, {}
    for _ in range(most):
        changes = {}
        for name in (name for name in layers if name not in gone):
            bypass(layers[name])
            pairs = zip(expected, batches, strict=True)
            changes[name] = sum(prediction_change(y, model(**b).logits, b.get("attention_mask")) for y, b in pairs)
            restore(layers[name])
        best = min(changes, key=changes.get)
        losses[best] = (changes[best] - before) / count
        gone, before = [*gone, best], changes[best]
        bypass(layers[best])
    for name in gone:
        restore(layers[name])
    return losses


@pytest.mark.parametrize("model_type", ["llama", "bert", "gpt2"])
def test_the_order_is_that_of_brute_force(model_type, monkeypatch):
    model, inputs = deeper(model_type)
    layers, batches = removable(model), batches_for(inputs)
    expected = by_brute_force(model.eval(), layers, batches, 2)
    before = snapshot(model)
    found = greedy_layer_losses(model, layers, batches, 2, False)
    assert_unchanged(model, before)
    assert bypassed_layers(model) == []
    assert sorted(found, key=found.get)[:2] == list(expected)
    assert found[next(iter(expected))] == pytest.approx(next(iter(expected.values())), rel=1e-3)
    assert min(found[name] for name in found.keys() - expected.keys()) > max(found[name] for name in expected)


def test_many_layers_are_chosen_among_the_twelve_that_cost_least(monkeypatch):
    model, inputs = deeper("llama", 16)
    layers, tried = removable(model), []
    changes = searched._changes

    def count(model, among, *rest):
        tried.append(len(among))
        return changes(model, among, *rest)

    monkeypatch.setattr(searched, "_changes", count)
    losses = greedy_layer_losses(model, layers, batches_for(inputs), 15, False)
    assert tried == [15, 1, *[12] * 3, *range(11, 1, -1)]
    assert len(set(losses.values())) == 15


def test_classifiers_are_judged_by_many_examples(monkeypatch):
    model, inputs = tiny("bert")
    batch = {name: value[:1].repeat(40, 1) for name, value in inputs().items()}
    assert sum(len(part["input_ids"]) for part in searched.sample_batches(model, [batch] * 8)) == 160
    monkeypatch.setattr(searched, "EXAMPLES", 10**6)
    assert sum(len(part["input_ids"]) for part in searched.sample_batches(model, [batch] * 8)) == 320


def deeper(model_type, number=5):
    """A tiny model of several layers."""
    model, inputs = tiny(model_type)
    name = {"gpt2": "n_layer"}.get(model_type, "num_hidden_layers")
    config = type(model.config).from_dict({**model.config.to_dict(), name: number, "layer_types": None})
    torch.manual_seed(1)
    return type(model)(config).eval(), inputs


def test_layers_that_hand_on_more_than_their_output_are_computed(monkeypatch):
    model, inputs = deeper("llama")
    layers, batches = removable(model), batches_for(inputs)
    state = {}

    def leave(module, args, output):
        state["mean"] = output.mean() + state.get("mean", 0.0)

    model.model.layers[1].mlp.register_forward_hook(leave)  # what a layer computes aside changes the last one
    model.model.layers[4].mlp.register_forward_hook(
        lambda module, args, output: output * (1 + 100 * state.pop("mean", 0.0))
    )
    expected = by_brute_force(model, layers, batches, 1)
    found = greedy_layer_losses(model, layers, batches, 1, False)
    assert min(found, key=found.get) == next(iter(expected))
    assert min(found.values()) == pytest.approx(min(expected.values()), rel=1e-3)


def test_a_sample_of_the_batches_is_looked_at(monkeypatch):
    model, inputs = deeper("llama")
    batches = [inputs() for _ in range(6)]
    tokens = batches[0]["input_ids"].shape[1]
    monkeypatch.setattr(searched, "TOKENS", 3 * tokens)
    parts = list(searched.sample_batches(model, batches))
    assert [len(part["input_ids"]) for part in parts] == [1, 1, 1]


@pytest.mark.parametrize("budget", [{"sparsity": 0.4}, {"target_flops": 0.7}])
def test_presets_choose_it_for_layers(budget):
    model, inputs = deeper("llama")
    batches = batches_for(inputs)
    expected = list(by_brute_force(model, removable(model), batches, 2))
    config = PruningConfig(preset="balanced", granularity="layer", **budget)
    assert config.criterion == "greedy"
    assert PruningConfig(preset="fast", granularity="layer").criterion == "magnitude"
    assert PruningConfig(preset="balanced", granularity=("neuron", "layer")).criterion == "fisher"
    prune(model, config.replace(repair=None), calibration=batches)
    gone = [name for name, layer in removable(model).items() if name in bypassed_layers(model)]
    assert gone == sorted(expected)[: len(gone)] if "sparsity" in budget else len(gone) in (1, 2)
    shrink(model)
    assert model.config.num_hidden_layers == 5 - len(gone)


def test_it_ranks_layers_only():
    with pytest.raises(ConfigError, match="criterion 'greedy' cannot rank neurons"):
        PruningConfig(criterion="greedy", granularity=("neuron", "layer"))
