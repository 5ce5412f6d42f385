"""Allocations learned from calibration data: exact in sum, better than uniform, the same each time, and in the plan."""

import copy

import pytest
import torch

from hf_prune.errors import CalibrationError, ConfigError
from hf_prune.kernels.least_squares import damped
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.pruning import learned_allocation
from hf_prune.pruning.learned_allocation import _error_curve
from hf_prune.pruning.mask_store import MaskStore
from tests import models
from tests.kernels.test_least_squares import problem
from tests.models import assert_unchanged, snapshot, tiny_batches
from tests.reference.reconstruction import reference_error, reference_least_squares


def planned(model, **settings):
    return prune(model, calibration=tiny_batches(model), dry_run=True, **settings)


@pytest.mark.parametrize("granularity", ["unstructured", "block:2x2"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "albert"])
def test_the_whole_loses_exactly_what_was_asked_for(kind, granularity):
    model = models.TRANSFORMERS[kind]()
    settings = {"sparsity": 0.7, "allocation": "fisher", "criterion": "sparsegpt", "granularity": granularity}
    plan = planned(model, **settings)
    total = sum(t.units for t in plan.tensors)
    assert sum(t.remove for t in plan.tensors) == round(0.7 * total)
    assert len({round(t.sparsity, 2) for t in plan.tensors}) > 2
    assert max(t.sparsity for t in plan.tensors) <= 0.98 + 1 / min(t.units for t in plan.tensors)
    prune(model, calibration=tiny_batches(model), **settings)
    masks = MaskStore.of(model).masks
    for t in plan.tensors:
        assert int((~masks[t.target.name]).sum()) == t.remove * (t.target.size // t.units)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_rows_lose_alike_within_the_cap(kind):
    model = models.TRANSFORMERS[kind]()
    plan = planned(model, sparsity=0.7, allocation="fisher", criterion="wanda", scope="row")
    total = sum(t.units for t in plan.tensors)
    removed = sum(t.remove for t in plan.tensors)
    assert 0.7 * total - max(t.units // t.pool for t in plan.tensors) - 1 <= removed <= round(0.7 * total)
    assert all(t.remove <= 0.98 * t.units for t in plan.tensors)
    assert len({t.sparsity for t in plan.tensors}) > 2


def test_owl_keeps_the_mean_and_spares_all_of_a_block():
    model = models.tiny_llama()
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.fill_(1)
                norm.weight[0] = 1 + 30 * i  # an outlier among the inputs of the second block
    plan = planned(model, sparsity=0.6, allocation="owl", criterion="wanda", scope="row")
    blocks = {}
    for t in plan.tensors:
        blocks.setdefault(t.target.name.split(".")[2], set()).add(round(t.sparsity, 9))
    assert {len(values) for values in blocks.values()} == {1}
    assert blocks["1"].pop() < 0.6 < blocks["0"].pop()
    plan = planned(model, sparsity=0.6, allocation="owl")
    assert sum(t.sparsity * t.units for t in plan.tensors) == pytest.approx(0.6 * sum(t.units for t in plan.tensors))


def test_what_costs_nothing_goes_first():
    """Six of eight inputs are always zero: the first layer gives their weights, and the second gives little."""
    dense = models.mlp()
    batches = tiny_batches(dense, sizes=(16, 16))
    for batch in batches:
        batch["x"][:, 2:] = 0
    errors, plans = {}, {}
    for allocation in ("uniform", "fisher"):
        model = copy.deepcopy(dense)
        plans[allocation] = prune(model, 0.6, allocation=allocation, calibration=batches, dry_run=True)
        prune(model, 0.6, criterion="alps", allocation=allocation, calibration=batches)
        with torch.no_grad():
            errors[allocation] = float(sum(((model(**b).logits - dense(**b).logits) ** 2).mean() for b in batches))
    first, second = plans["fisher"].tensors
    assert first.sparsity >= 0.74
    assert second.sparsity < 0.25
    assert errors["fisher"] < 0.1 * errors["uniform"]


@pytest.mark.parametrize("allocation", ["fisher", "owl"])
def test_the_same_call_gives_the_same_plan_and_changes_nothing(allocation):
    model = models.tiny_bert()
    before = snapshot(model)
    plans = [planned(model, allocation=allocation) for _ in range(2)]
    assert plans[0] == plans[1]
    assert_unchanged(model, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert "by data" not in str(plans[0])
    assert f"allocation {allocation}" in str(plans[0])


def test_without_data_the_plan_says_what_it_does_not_know():
    model = models.tiny_bert()
    plan = make_plan(model, PruningConfig(0.5, allocation="fisher"))
    assert "by data" in str(plan)
    assert plan.removed_parameters == round(0.5 * plan.target_parameters)
    before = snapshot(model)
    with pytest.raises(CalibrationError, match="allocation='fisher' needs calibration data, and got none"):
        prune(model, 0.5, allocation="fisher")
    assert_unchanged(model, before)


def test_pruning_again_keeps_what_is_gone():
    model = models.tiny_bert()
    batches = tiny_batches(model)
    prune(model, 0.4, allocation="fisher", criterion="sparsegpt", calibration=batches)
    early = {name: mask.clone() for name, mask in MaskStore.of(model).masks.items()}
    prune(model, 0.7, allocation="fisher", criterion="sparsegpt", calibration=batches)
    masks = MaskStore.of(model).masks
    assert all(not (masks[name] & ~mask).any() for name, mask in early.items())
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.7 * total)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("block", "pruned"), [((1, 1), False), ((16, 1), False), ((1, 1), True)])
def test_some_rows_stand_for_all(seed, block, pruned, monkeypatch):
    """Also where a few outputs matter far more than the others, and where weights are gone already."""
    weight, _, gram = problem(rows=640, columns=24, tokens=400, seed=seed)
    outputs = torch.randn(640, generator=torch.Generator().manual_seed(seed)).mul(2).exp().double()
    old = torch.rand(640, 24, generator=torch.Generator().manual_seed(seed)) > 0.4 if pruned else None
    weight = weight if old is None else weight * old
    estimated = _error_curve(weight, gram, outputs, block, old)
    monkeypatch.setattr("hf_prune.pruning.learned_allocation._ROWS", 640)
    exact = _error_curve(weight, gram, outputs, block, old)
    assert estimated != exact
    for (share, found), (_, expected) in zip(estimated[1:], exact[1:], strict=True):
        assert found == pytest.approx(expected, rel=0.15, abs=1e-9 if pruned and share < 0.4 else 0)


def test_the_inputs_of_a_block_are_gathered_in_one_pass_if_they_are_small(monkeypatch):
    """BERT has two blocks of four steps each; the pruning is the same."""
    gathered = []
    weighted = learned_allocation.weighted_grams
    monkeypatch.setattr(
        learned_allocation,
        "weighted_grams",
        lambda reader, step, *more: gathered.append(step) or weighted(reader, step, *more),
    )
    masks = []
    for limit, passes in ((learned_allocation._TOGETHER, 2), (0, 8)):
        monkeypatch.setattr(learned_allocation, "_TOGETHER", limit)
        gathered.clear()
        model = models.tiny_bert()
        targets = r".*encoder\.layer.*"
        prune(model, 0.5, allocation="fisher", target_modules=targets, calibration=tiny_batches(model))
        assert len(gathered) == passes
        assert sum(map(len, gathered)) == 12
        masks.append(MaskStore.of(model).masks)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


@pytest.mark.parametrize("seed", range(3))
def test_error_curves_lie_between_no_repair_and_exact_least_squares(seed):
    weight, inputs, gram = problem(rows=6, columns=12, tokens=200, seed=seed)
    outputs = torch.rand(6).double()
    curve = _error_curve(weight, gram, outputs, (1, 1), None)
    assert [share for share, _ in curve] == [0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98]
    errors = [error for _, error in curve]
    assert errors == sorted(errors)
    worth = weight**2 * outputs[:, None] / torch.linalg.inv(damped(gram)).diagonal()
    for share, error in curve[1:]:
        keep = torch.ones(72, dtype=torch.bool)
        keep[worth.flatten().argsort()[: round(share * 72)]] = False
        keep = keep.view(6, 12)
        exact, plain = reference_least_squares(weight, keep, inputs), weight * keep
        bounds = [
            sum(float(o) * reference_error(weight[i : i + 1], new[i : i + 1], inputs) for i, o in enumerate(outputs))
            for new in (exact, plain)
        ]
        assert bounds[0] <= error <= 1.1 * bounds[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allocation": "fisher", "scope": "global"}, r"allocation='fisher' contradicts scope='global'"),
        ({"allocation": "owl", "granularity": "2:4"}, r"allocation='owl' contradicts granularity='2:4'"),
        ({"allocation": "fischer"}, r"unknown allocation 'fischer': .* Did you mean 'fisher'"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        PruningConfig(**settings)
