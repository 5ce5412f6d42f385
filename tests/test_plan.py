"""The plan: exact counts, a table to read, and every refusal before anything changes."""

import json

import pytest
import torch
from torch import nn

from hf_prune.config import PruningConfig
from hf_prune.errors import MaskError, PlanError
from hf_prune.masking import MaskStore
from hf_prune.pipeline import prune
from hf_prune.plan import make_plan
from hf_prune.report import sparsity_report
from tests import models
from tests.models import assert_unchanged, mlp, snapshot


def removes(model: nn.Module, **settings) -> list[int | None]:
    return [t.remove for t in make_plan(model, PruningConfig(**settings)).tensors]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sparsity": 0.3}, [29, 11]),  # 0.3 * 96 = 28.8, 0.3 * 36 = 10.8
        ({"sparsity": 0.3, "scope": "row"}, [12 * 2, 3 * 4]),  # 0.3 * 8 = 2.4, 0.3 * 12 = 3.6
        ({"sparsity": 0.3, "granularity": "block:3x2"}, [5, 2]),  # 0.3 * 16 = 4.8, 0.3 * 6 = 1.8
        ({"sparsity": 0.3, "granularity": "block:3x2", "scope": "row"}, [4 * 1, 1 * 2]),  # 0.3 * 4 = 1.2, 0.3 * 6
        ({"granularity": "2:4"}, [48, 18]),
        ({"granularity": "1:4"}, [72, 27]),
        ({"sparsity": 0.0}, [0, 0]),
        ({"sparsity": 1.0}, [96, 36]),
        ({"sparsity": 0.3, "allocation": {"fc2": 0.5}}, [29, 18]),
    ],
)
def test_counts_by_hand(settings, expected):
    assert removes(models.mlp(), **settings) == expected  # fc1 is (12, 8), fc2 is (3, 12)


def test_global_scope_counts_over_all_tensors():
    plan = make_plan(models.mlp(), PruningConfig(0.3, scope="global"))
    assert plan.remove == 40  # 0.3 * 132 = 39.6
    assert [(t.remove, t.sparsity) for t in plan.tensors] == [(None, None)] * 2


def test_halves_round_to_even_as_in_torch():
    assert removes(nn.Linear(5, 1), sparsity=0.5) == [2]
    assert removes(nn.Linear(7, 1), sparsity=0.5) == [4]


def test_totals_count_tied_weights_once():
    model = models.tied_linears()
    plan = make_plan(model, PruningConfig(0.5))
    assert plan.total_parameters == 64 + 8 + 8 + 16 + 2
    assert plan.target_parameters == 64 + 16
    assert plan.removed_parameters == 32 + 8
    assert plan.total_bytes == 4 * plan.total_parameters
    assert plan.element_size == 4
    assert make_plan(model.to(torch.bfloat16), PruningConfig()).total_bytes == 2 * plan.total_parameters


def test_blocks_count_as_their_weights():
    plan = make_plan(models.mlp(), PruningConfig(0.3, granularity="block:3x2"))
    assert (plan.remove, plan.removed_parameters) == (7, 42)


def test_already_removed_weights_are_shown():
    model = prune(models.mlp(), 0.25)
    assert [t.already for t in make_plan(model, PruningConfig(0.5)).tensors] == [24, 9]


def test_a_plan_changes_nothing(any_transformer):
    before = snapshot(any_transformer)
    plan = make_plan(any_transformer, PruningConfig(0.5))
    str(plan)
    plan.to_dict()
    assert_unchanged(any_transformer, before)
    assert MaskStore.of(any_transformer) is None
    assert plan.model_name == type(any_transformer).__name__


def test_the_table():
    assert str(make_plan(models.mlp(), PruningConfig(0.3, exclude_modules=["fc2"]))) == (
        "Plan for MLP: magnitude, unstructured, scope layer, allocation uniform\n"
        "weight      shape  weights  sparsity  units to remove  removed already\n"
        "----------  -----  -------  --------  ---------------  ---------------\n"
        "fc1.weight  12x8        96   30.00 %               29                0\n"
        "29 of 96 target weights go (30.21 %), 19.73 % of the model's 147 parameters.\n"
        "Targets: 384 B dense; the same as bit mask and surviving values: 280 B.\n"
        "Multiply-adds per token or position in the targets: 96 dense, 67 with a non-zero weight. "
        "Dense kernels compute the zeros too: zeros alone bring no speed-up."
    )


def test_the_table_in_global_scope_and_with_an_explicit_allocation():
    assert "by score" in str(make_plan(models.mlp(), PruningConfig(scope="global")))
    assert "allocation explicit" in str(make_plan(models.mlp(), PruningConfig(allocation={"fc1": 0.1})))


def test_to_dict_is_json():
    values = json.loads(json.dumps(make_plan(models.mlp(), PruningConfig(0.3)).to_dict()))
    assert values["config"] == PruningConfig(0.3).to_dict()
    assert values["removed_parameters"] == 40
    assert values["tensors"][1] == {
        "name": "fc2.weight",
        "shape": [3, 12],
        "units": 36,
        "sparsity": 0.3,
        "remove": 11,
        "already_removed": 0,
    }


def test_n_m_that_does_not_divide_is_refused():
    model = models.tiny_resnet()
    message = (
        r"granularity '2:4' does not divide 1 of \d+ targets: .*\(8, 3, 7, 7\): its 3 inputs are no multiple of 4\. "
    )
    with pytest.raises(
        PlanError, match=message + "Choose another granularity, or list those modules in exclude_modules"
    ):
        make_plan(model, PruningConfig(granularity="2:4", target_modules=".*"))
    stem = "resnet.embedder.embedder.convolution"
    assert make_plan(model, PruningConfig(granularity="2:4", target_modules=".*", exclude_modules=[stem])).remove > 0


def test_n_m_may_not_cross_the_positions_of_a_kernel():
    """6 channels x 6 positions are 36 columns, which 4 divides; 6 inputs it does not."""
    with pytest.raises(PlanError, match="its 6 inputs are no multiple of 4"):
        make_plan(nn.Sequential(nn.Conv2d(6, 2, (2, 3))), PruningConfig(granularity="2:4", target_modules=["0"]))


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        ("block:5x1", r"its 12 outputs are no multiple of 5; fc2 .* its 3 outputs"),
        ("block:1x5", r"its 8 inputs are no"),
    ],
)
def test_blocks_that_do_not_divide_are_refused(granularity, message):
    with pytest.raises(PlanError, match=rf"does not divide 2 of 2 targets: fc1 \(12, 8\): {message}"):
        make_plan(models.mlp(), PruningConfig(granularity=granularity))


def test_a_long_list_is_cut(bert):
    with pytest.raises(PlanError, match=r"does not divide 14 of 14 targets: .*; .*; .* and 11 more\. Choose"):
        make_plan(bert, PruningConfig(granularity="block:1x7"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_weights_are_refused_before_any_change(bert, bad):
    prune(bert, 0.2)
    with torch.no_grad():
        bert.classifier.weight[1, 3] = bad
    before, masks = snapshot(bert), dict(MaskStore.of(bert).masks)
    with pytest.raises(
        PlanError, match=r"NaN or infinite values in classifier\.weight: expected finite weights; check how"
    ):
        prune(bert, 0.5)
    assert_unchanged(bert, before)
    assert {n: id(m) for n, m in masks.items()} == {n: id(m) for n, m in MaskStore.of(bert).masks.items()}


def test_a_bad_weight_that_is_no_target_is_nobodys_business(bert):
    with torch.no_grad():
        bert.bert.embeddings.word_embeddings.weight[0, 0] = float("nan")
    assert make_plan(bert, PruningConfig()).remove > 0


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_less_than_before_is_refused(scope):
    model = prune(models.mlp(hidden=40), 0.5, scope=scope)
    before, store = snapshot(model), MaskStore.of(model)
    masks = {name: mask.clone() for name, mask in store.masks.items()}
    message = r"sparsity=0\.3 is below what earlier pruning already removed .*\(\d+ of 440 weights, 5\d\.\d\d %\), and "
    with pytest.raises(
        PlanError, match=message + r"pruning only adds zeros: ask for more, or call discard_masks\(\) first"
    ):
        prune(model, 0.3, scope=scope)
    assert_unchanged(model, before)
    assert MaskStore.of(model) is store
    assert all(torch.equal(store.masks[name], mask) for name, mask in masks.items())
    assert store.config.sparsity == 0.5


def test_the_same_sparsity_in_another_scope_may_round_differently():
    model = prune(models.mlp(hidden=40), 0.3)
    zeros = int((model.fc1.weight == 0).sum())
    prune(model, 0.3, scope="global")
    assert int((model.fc1.weight == 0).sum()) >= zeros


def test_masks_that_no_longer_fit_are_refused_before_any_change():
    model = prune(models.mlp(), 0.3, exclude_modules=["fc1"])
    model.fc2 = models.fill(nn.Linear(12, 5))
    before = snapshot(model)
    with pytest.raises(
        MaskError, match=r"mask of 'fc2\.weight' has shape \(3, 12\), but the model has shape \(5, 12\)"
    ):
        prune(model, 0.5)
    model.fc2 = nn.Identity()
    with pytest.raises(MaskError, match=r"but the model has no parameter there: the model was changed after pruning"):
        prune(model, 0.5, target_modules=["fc1"])
    assert list(MaskStore.of(model).masks) == ["fc2.weight"]
    assert torch.equal(model.fc1.weight, before["fc1.weight"])


def test_what_earlier_prunings_removed_makes_the_count_a_lower_bound():
    model = prune(mlp(hidden=24), 0.3)
    plan = prune(model, 0.5, granularity="block:3x2", dry_run=True)
    assert not plan.is_exact
    assert f"At least {plan.removed_parameters:,} of" in str(plan)
    prune(model, 0.5, granularity="block:3x2")
    assert sparsity_report(model).removed >= plan.removed_parameters
    fresh = prune(mlp(hidden=24), 0.5, dry_run=True)
    assert fresh.is_exact
    assert "At least" not in str(fresh)


def test_matrices_that_no_config_can_target_are_named():
    """Fused experts and packed projections are neither Linear nor convolution: the plan says so."""
    attention = nn.MultiheadAttention(8, 2)
    model = nn.Sequential(nn.Embedding(10, 8), attention, nn.Linear(8, 4))
    plan = prune(model, 0.5, dry_run=True)
    assert dict(plan.uncovered) == {"1.in_proj_weight": 24 * 8}
    assert "Not covered: 192 parameters in 1 matrices outside Linear, Conv1D and convolutions, such as" in str(plan)
    assert plan.to_dict()["uncovered_parameters"] == 192
    assert "Not covered" not in str(prune(mlp(), 0.5, dry_run=True))
