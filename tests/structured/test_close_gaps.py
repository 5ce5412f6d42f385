"""The matrix before a gap of removed layers: solved for as by hand, and only where its output is added and no more."""

import copy

import pytest
import torch

from hf_prune import PruningConfig, prune, shrink
from hf_prune.architectures.bypass import bypass
from hf_prune.structured.close_gaps import close_gaps, find_gaps
from tests.architecture_models import tiny
from tests.models import assert_unchanged, snapshot
from tests.structured.test_layer_losses import deeper


def states(model, batch):
    """The hidden states behind each layer, without padding, by layer."""
    kept = {}
    handles = [
        layer.register_forward_hook(lambda module, args, output, i=i: kept.update({i: output}))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return {i: output[batch["attention_mask"].bool()] for i, output in kept.items()}


def inputs_of(module, model, batch):
    kept = []
    handle = module.register_forward_hook(lambda module, args, output: kept.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return kept[0][batch["attention_mask"].bool()]


def test_the_solution_is_that_of_ridge_regression():
    model, inputs = deeper("llama")
    batch = inputs()
    batch["attention_mask"][0, :3] = 0
    dense = copy.deepcopy(model)
    removed = ["model.layers.2", "model.layers.3"]
    for name in removed:
        bypass(model.get_submodule(name))
    x = inputs_of(dense.model.layers[1].mlp.down_proj, dense, batch).double()
    missing = (states(dense, batch)[3] - states(dense, batch)[1]).double()
    gram = x.T @ x
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    expected = dense.model.layers[1].mlp.down_proj.weight + torch.linalg.solve(gram + ridge, x.T @ missing).T
    written = {}
    solved = close_gaps(model, removed, [batch], written.update, False, 2**20)
    assert solved == list(written) == ["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(written[solved[0]].double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_gaps_are_runs_of_layers_with_one_before_them():
    model, _ = deeper("llama")
    names = [f"model.layers.{i}" for i in range(5)]

    def found(*numbers):
        gaps = find_gaps(model, [names[i] for i in numbers])
        layers = list(model.model.layers)
        return [(layers.index(gap.before), layers.index(gap.last)) for gap in gaps]

    assert found(1, 2, 4) == [(0, 2), (3, 4)]
    assert found(0) == []  # nothing is before it
    bypass(model.model.layers[2])
    assert found(3) == [(1, 3)]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_pruning_with_a_repair_comes_closer_to_the_dense_states(model_type):
    outcomes = {}
    for repair in (None, "least_squares"):
        model, inputs = deeper(model_type)
        batch = inputs()
        with torch.no_grad():
            dense = model(**batch).logits
        prune(model, granularity="layer", criterion="greedy", sparsity=0.4, repair=repair, calibration=[batch])
        with torch.no_grad():
            masked = model(**batch).logits
        shrink(model)
        torch.testing.assert_close(model(**batch).logits, masked)
        seen = batch["attention_mask"].bool()
        outcomes[repair] = float((masked - dense)[seen].square().mean())
    assert outcomes["least_squares"] < 0.01 * outcomes[None]


def test_where_a_norm_follows_nothing_is_solved_for():
    model, inputs = deeper("bert")
    before = snapshot(model)
    name = "bert.encoder.layer.2"
    bypass(model.get_submodule(name))
    assert len(find_gaps(model, [name])) == 1
    assert close_gaps(model, [name], [inputs()], lambda weights: pytest.fail("written"), False, 2**20) == []
    assert_unchanged(model, before)
    settings = {"granularity": "layer", "criterion": "magnitude", "sparsity": 0.2, "repair": "least_squares"}
    with pytest.warns(UserWarning, match="repair='least_squares' changed nothing"):
        prune(deeper("bert")[0], **settings, calibration=[inputs()])


def test_an_error_gives_the_weights_back(monkeypatch):
    model, inputs = deeper("llama")
    before = snapshot(model)
    monkeypatch.setattr("hf_prune.structured.prune_units.unit_masks", lambda *_: {"no such weight": torch.ones(1)})
    with pytest.raises(AttributeError):
        prune(
            model,
            granularity="layer",
            criterion="greedy",
            sparsity=0.4,
            repair="least_squares",
            calibration=[inputs()],
        )
    assert_unchanged(model, before)


def test_padding_is_left_out_where_a_model_flattens_its_tokens():
    model, inputs = tiny("opt")
    batch = inputs()
    batch["attention_mask"][0, -3:] = 0
    config = PruningConfig(granularity="layer", criterion="random", repair="least_squares", sparsity=0.34)
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    prune(model, config, calibration=[batch])
    assert any(not torch.equal(p, dense[name]) for name, p in model.named_parameters() if name.endswith("fc2.weight"))
