"""Several steps: nested masks, exact counts, gradients taken anew, and what cannot be done in steps."""

import pytest
import torch

from hf_prune.criteria.registry import CRITERIA
from hf_prune.errors import CalibrationError, ConfigError
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.pruning import transaction
from hf_prune.pruning.iterative import step_plans, step_sparsities
from hf_prune.pruning.mask_store import MaskStore
from tests import models
from tests.models import assert_unchanged, mlp, same_bits, snapshot, tiny_batches

LEARNING = ["fisher", "fisher_diagonal", "snip", "taylor"]


def masks_of(model) -> dict:
    return dict(MaskStore.of(model).masks)


def counts(model) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in masks_of(model).items()}


def test_each_step_removes_the_same_share_of_what_is_left():
    assert step_sparsities(3, 0.0, 0.875) == pytest.approx([0.5, 0.75, 0.875])
    assert step_sparsities(2, 0.5, 0.875) == pytest.approx([0.75, 0.875])
    assert step_sparsities(1, 0.0, 0.3) == [0.3]
    assert step_sparsities(4, 0.0, 0.0) == [0.0] * 4
    assert step_sparsities(2, 1.0, 1.0) == [1.0]
    until = step_sparsities(5, 0.0, 1.0)
    assert until[-1] == 1.0
    assert until[:-1] == sorted(until[:-1])
    assert until[-2] < 0.99


@pytest.mark.covering(2)
@pytest.mark.parametrize("scope", ["row", "layer", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.8, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_last_plan_is_the_whole_one_and_each_removes_more(scope, sparsity, steps):
    plan = make_plan(mlp(), PruningConfig(sparsity, "taylor", scope=scope, steps=steps))
    found = list(step_plans(plan))
    assert 1 <= len(found) <= steps
    assert found[-1] == plan
    removed = [part.remove for part in found]
    assert removed == sorted(set(removed))
    if sparsity == 0.8 and scope == "layer":
        wanted = [1 - 0.2 ** ((step + 1) / steps) for step in range(steps)]
        for part, share in zip(found, wanted, strict=True):
            assert all(t.remove == pytest.approx(share * t.units, abs=1) for t in part.tensors)


def test_steps_of_n_m_remove_whole_weights_of_every_pool():
    plan = make_plan(models.tiny_bert(), PruningConfig(None, "taylor", "1:8", exclude_modules=["classifier"], steps=4))
    per_pool = [part.tensors[0].remove // (part.tensors[0].units // 8) for part in step_plans(plan)]
    assert per_pool == [3, 5, 6, 7]
    few = make_plan(models.tiny_bert(), PruningConfig(None, "taylor", "2:4", exclude_modules=["classifier"], steps=9))
    assert [part.remove / few.remove for part in step_plans(few)] == [0.5, 1.0]


@pytest.fixture
def seen(monkeypatch):
    """The masks after each step."""
    found = []
    zero = transaction.zero_weight

    def watched(model, name, mask):
        weight = model.get_parameter(name)
        found.append((id(weight), mask.clone(), weight.detach().clone()))
        zero(model, name, mask)

    monkeypatch.setattr(transaction, "zero_weight", watched)
    return found


@pytest.mark.covering(1)
@pytest.mark.parametrize("criterion", LEARNING)
@pytest.mark.parametrize(
    ("granularity", "scope"),
    [*(("unstructured", scope) for scope in ("row", "layer", "global")), ("1:4", "layer"), ("block:4x2", "global")],
)
def test_masks_grow_and_counts_are_exact(criterion, granularity, scope, seen):
    model = models.tiny_gpt2()
    config = PruningConfig(None if granularity == "1:4" else 0.8, criterion, granularity, scope, steps=3)
    plan = make_plan(model, config)
    prune(model, config, calibration=tiny_batches(model))
    area = plan.granularity.block[0] * plan.granularity.block[1]
    if scope == "global":
        assert sum(counts(model).values()) == plan.remove * area
    else:
        assert counts(model) == {t.target.name: t.remove * area for t in plan.tensors}
    by_weight: dict[int, list[torch.Tensor]] = {}
    for key, mask, _ in seen:
        by_weight.setdefault(key, []).append(mask)
    assert {len(masks) for masks in by_weight.values()} == {3}
    for earlier, middle, last in by_weight.values():
        assert not (middle & ~earlier).any()
        assert not (last & ~middle).any()
    total = [sum(int((~masks[step]).sum()) for masks in by_weight.values()) for step in range(3)]
    assert total == sorted(set(total))
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks_of(model).items())
    assert MaskStore.of(model).config == config


@pytest.mark.parametrize("criterion", LEARNING)
def test_a_step_is_a_pruning_by_itself(criterion):
    """Two steps to 0.75 are 0.5 and then 0.75, each in one step."""
    model, twice = models.tiny_bert(), models.tiny_bert()
    batches = tiny_batches(model)
    prune(model, 0.75, criterion=criterion, calibration=batches, steps=2)
    for sparsity in (0.5, 0.75):
        prune(twice, sparsity, criterion=criterion, calibration=batches)
    assert_unchanged(twice, snapshot(model))


@pytest.mark.parametrize("criterion", LEARNING)
def test_gradients_are_taken_anew(criterion):
    model, once = models.tiny_classifier(), models.tiny_classifier()
    batches = tiny_batches(model, sizes=(8, 8))
    prune(model, 0.8, criterion=criterion, calibration=batches, steps=4)
    prune(once, 0.8, criterion=criterion, calibration=batches)
    assert counts(model) == counts(once)
    assert any(not torch.equal(mask, masks_of(once)[name]) for name, mask in masks_of(model).items())


def test_steps_after_an_earlier_pruning():
    model = models.tiny_bert()
    batches = tiny_batches(model)
    prune(model, 0.5, criterion="taylor", calibration=batches)
    early = masks_of(model)
    prune(model, 0.8, criterion="fisher", calibration=batches, steps=3)
    assert not any(bool((mask & ~early[name]).any()) for name, mask in masks_of(model).items())
    assert all(int((~m).sum()) == round(0.8 * m.numel()) for m in masks_of(model).values())


@pytest.mark.parametrize("criterion", LEARNING)
@pytest.mark.parametrize("keep_dense", [False, True])
def test_an_error_in_a_later_step_gives_the_weights_back(criterion, keep_dense, monkeypatch):
    model = models.tiny_bert()
    batches, before, calls = tiny_batches(model), snapshot(model), []

    def fail(model, name, mask):
        calls.append(mask)
        if len(calls) == 20:  # in the second step: there are 14 weights
            raise CalibrationError("out of luck")
        model.get_parameter(name).data.masked_fill_(~mask, 0)

    monkeypatch.setattr(transaction, "zero_weight", fail)
    with pytest.raises(CalibrationError, match="out of luck"):
        prune(model, 0.8, criterion=criterion, calibration=batches, steps=3, keep_dense=keep_dense)
    assert_unchanged(model, before)
    assert MaskStore.of(model) is None


@pytest.mark.parametrize("criterion", LEARNING)
def test_dense_weights_come_back(criterion):
    model = models.tiny_bert()
    before = snapshot(model)
    prune(model, 0.8, criterion=criterion, calibration=tiny_batches(model), steps=3, keep_dense=True)
    MaskStore.of(model).discard(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("criterion", [name for name in CRITERIA.names() if name not in LEARNING])
def test_criteria_that_learn_nothing_from_gradients_are_refused(criterion):
    message = rf"steps=2 contradicts criterion '{criterion}', which learns nothing from gradients: choose another"
    with pytest.raises(ConfigError, match=message):
        PruningConfig(criterion=criterion, steps=2)


def test_steps_and_a_repair_are_refused():
    with pytest.raises(
        ConfigError, match=r"steps=2 contradicts repair='least_squares', which reproduces the outputs of"
    ):
        PruningConfig(criterion="taylor", steps=2, repair="least_squares")


@pytest.mark.parametrize("steps", [0, -1, 1.5, "2", True, None])
def test_a_number_of_steps_that_is_none_is_refused(steps):
    with pytest.raises(ConfigError, match=r"steps is .*: expected an integer of at least 1"):
        PruningConfig(criterion="taylor", steps=steps)


def test_the_plan_and_the_config_say_how_many_steps():
    config = PruningConfig(criterion="taylor", steps=4)
    assert PruningConfig.from_json(config.to_json()) == config
    assert "allocation uniform, in 4 steps\n" in str(make_plan(mlp(), config))
    assert "steps" not in str(make_plan(mlp(), PruningConfig(criterion="taylor"))).splitlines()[0]


def test_a_generator_of_batches_serves_every_step():
    model, twin = mlp(), mlp()
    batches = tiny_batches(model)
    prune(model, 0.8, criterion="fisher", calibration=(batch for batch in batches), steps=3)
    prune(twin, 0.8, criterion="fisher", calibration=batches, steps=3)
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
