"""Gradient statistics: equal to a loop written by hand, and a model that is as it was before."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from hf_prune.calibration.statistics import collect_stats
from hf_prune.errors import CalibrationError
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.pruning.mask_store import MaskStore
from tests import models
from tests.models import assert_same_masks, assert_unchanged, mlp, snapshot, tiny_batches


def collect(model: nn.Module, batches, criterion: str = "taylor", **settings):
    return collect_stats(model, make_plan(model, PruningConfig(criterion=criterion, **settings)), batches)


def by_hand(model: nn.Module, batches, absolute: bool) -> dict[str, torch.Tensor]:
    """Mean over the examples of each batch's gradient, or of its absolute value, by backward()."""
    model.eval()
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        size = len(batch["labels"])
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += size * (parameter.grad.abs() if absolute else parameter.grad)
    model.zero_grad()
    return {name: total / sum(len(batch["labels"]) for batch in batches) for name, total in sums.items()}


def state(model: nn.Module) -> tuple:
    """What calibration must leave alone, besides the values."""
    return (
        [
            (name, p.requires_grad, p.is_leaf, None if p.grad is None else p.grad.clone().tolist())
            for name, p in model.named_parameters()
        ],
        [(name, module.training) for name, module in model.named_modules()],
        torch.is_grad_enabled(),
    )


def unusual(model: nn.Module) -> nn.Module:
    """Mixed modes, a frozen target, and gradients from elsewhere."""
    model.train()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    linears[0].eval()
    linears[0].weight.requires_grad_(False)
    linears[-1].weight.grad = torch.full_like(linears[-1].weight, 3.0)
    return model


@pytest.mark.parametrize(("criterion", "statistic"), [("taylor", "absolute_gradient"), ("snip", "gradient")])
@pytest.mark.parametrize("kind", ["bert", "albert", "gpt2", "t5", "resnet", "mlp"])
def test_statistics_equal_a_loop_by_hand(criterion, statistic, kind):
    """Batches of unequal size, so a mean over batches would differ."""
    model = mlp() if kind == "mlp" else models.TRANSFORMERS[kind]()
    batches = tiny_batches(model, sizes=(4, 1, 2))
    expected = by_hand(
        models.TRANSFORMERS[kind]() if kind != "mlp" else mlp(), batches, statistic == "absolute_gradient"
    )
    found = collect(model, batches, criterion)
    assert found
    for tensor in make_plan(model, PruningConfig()).tensors:
        name = tensor.target.name
        matrix = tensor.target.matrix(expected[name])
        torch.testing.assert_close(getattr(found[name], statistic), matrix, rtol=1e-4, atol=1e-7)
        assert getattr(found[name], statistic).dtype == torch.float32
        other = {"gradient", "absolute_gradient"} - {statistic}
        assert all(getattr(found[name], field) is None for field in other)
    assert any(bool(getattr(stats, statistic).any()) for stats in found.values())


def test_the_two_statistics_differ():
    model = mlp()
    batches = tiny_batches(model, sizes=(3, 3, 3))
    mean = collect(model, batches, "snip")["fc1.weight"].gradient
    absolute = collect(model, batches, "taylor")["fc1.weight"].absolute_gradient
    assert (absolute >= mean.abs() - 1e-7).all()
    assert (absolute > mean.abs() + 1e-4).any()


def test_conv1d_statistics_are_out_by_in(gpt2):
    found = collect(gpt2, tiny_batches(gpt2))
    assert found["transformer.h.0.attn.c_attn.weight"].absolute_gradient.shape == (48, 16)


def test_a_shared_target_sums_over_its_uses():
    """One weight in two places has one gradient: the sum of both."""
    tied, apart = models.tied_linears(), models.tied_linears()
    apart.second.weight = nn.Parameter(apart.first.weight.detach().clone())
    batches = tiny_batches(tied, sizes=(4,))
    gradients = by_hand(apart, batches, absolute=False)
    found = collect(tied, batches, "snip")
    assert list(found) == ["first.weight", "head.weight"]
    both = gradients["first.weight"] + gradients["second.weight"]
    torch.testing.assert_close(found["first.weight"].gradient, both)
    assert not torch.allclose(found["first.weight"].gradient, gradients["first.weight"], atol=1e-5)


def test_dropout_is_off():
    model = models.tiny_bert(hidden_dropout_prob=0.5).train()
    batches = tiny_batches(model)
    first, second = (collect(model, batches)["classifier.weight"].absolute_gradient for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["bert", "resnet", "gpt2"])
def test_the_model_is_as_before(kind):
    model = unusual(models.TRANSFORMERS[kind]())
    before, was = snapshot(model), state(model)
    collect(model, tiny_batches(model))
    assert state(model) == was
    assert_unchanged(model, before)


def test_it_works_without_gradients_enabled():
    model = mlp()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        found = collect(model, tiny_batches(model))
        assert not torch.is_grad_enabled()
    assert bool(found["fc1.weight"].absolute_gradient.any())
    assert not found["fc1.weight"].absolute_gradient.requires_grad


class Interrupted(Exception):
    pass


def failing(batches):
    yield from batches
    raise Interrupted


@pytest.mark.parametrize("kind", ["bert", "resnet"])
def test_an_exception_midway_leaves_the_model_as_before(kind):
    model = prune(unusual(models.TRANSFORMERS[kind]()), 0.1)
    before, was, store = snapshot(model), state(model), MaskStore.of(model)
    with pytest.raises(Interrupted):
        prune(model, 0.5, criterion="taylor", calibration=failing(tiny_batches(model)))
    assert state(model) == was
    assert_unchanged(model, before)
    assert_same_masks(model, store)
    assert store.config.sparsity == 0.1


def test_an_exception_inside_the_model_leaves_it_as_before():
    model = unusual(models.tiny_bert())
    was = state(model)

    def stop(*_):
        raise Interrupted

    handle = model.classifier.register_forward_hook(stop)
    with pytest.raises(Interrupted):
        collect(model, tiny_batches(model))
    handle.remove()
    assert state(model) == was


def test_criteria_that_need_no_data_read_none():
    model = mlp()
    found = collect(model, failing([]), "magnitude")
    assert [(s.gradient, s.absolute_gradient) for s in found.values()] == [(None, None)] * 2
    assert len({s.seed for s in found.values()}) == 2


def test_seeds_depend_on_the_config_and_the_name_only():
    seeds = [collect(mlp(n), None, "random", seed=s)["fc1.weight"].seed for n, s in ((0, 0), (1, 0), (0, 1))]
    assert seeds[0] == seeds[1] != seeds[2]


def test_mappings_that_are_no_dict():
    model = models.tiny_bert()
    batches = tiny_batches(model)
    expected = collect(model, batches)["classifier.weight"].absolute_gradient
    assert torch.equal(collect(model, map(BatchEncoding, batches))["classifier.weight"].absolute_gradient, expected)


def test_values_that_are_no_tensor_are_passed_on():
    model = models.tiny_gpt2()
    batches = tiny_batches(model)
    expected = collect(model, batches)["transformer.h.0.mlp.c_fc.weight"].absolute_gradient
    found = collect(model, [{"use_cache": False, **batch} for batch in batches])
    torch.testing.assert_close(found["transformer.h.0.mlp.c_fc.weight"].absolute_gradient, expected)


class Unused(models.MLP):
    """A Linear that no batch reaches."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(4, 4)


def test_a_weight_that_no_batch_reaches_has_no_gradient_and_goes_first():
    model = models.fill(Unused())
    batches = tiny_batches(mlp())
    assert not collect(model, batches, scope="global")["idle.weight"].absolute_gradient.any()
    prune(model, 16 / (96 + 36 + 16), criterion="taylor", scope="global", calibration=batches)
    assert not model.idle.weight.any()
    assert bool(model.fc1.weight.all())


@pytest.mark.parametrize("criterion", ["taylor", "snip"])
def test_within_a_layer_it_goes_by_magnitude(criterion):
    model, plain = models.fill(Unused()), models.fill(Unused())
    with pytest.warns(UserWarning, match=r"depend on no weight of 1 matrices on these batches \(idle\.weight\)"):
        prune(model, 0.5, criterion=criterion, calibration=tiny_batches(mlp()))
    assert torch.equal(model.idle.weight, prune(plain, 0.5).idle.weight)


class Fixed(nn.Module):
    """Returns a loss made from its weight by a function."""

    def __init__(self, loss):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.loss = loss

    def forward(self, x, labels=None):
        return SimpleNamespace(loss=self.loss(self.fc.weight))


@pytest.mark.parametrize("criterion", ["taylor", "snip"])
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, r"criterion '{}' needs calibration data, and got none: pass calibration=, a list of texts"),
        ([], r"calibration has no batches: expected at least one; a used-up generator yields none"),
        ([{"x": torch.ones(2, 8)}], r"the model returned no loss for a batch with x: expected the labels among them"),
        ([torch.ones(2, 8)], r"a calibration batch is a Tensor: expected a dict of model inputs"),
        ({"x": torch.ones(2, 8)}, "the model returned no loss for a batch with x: expected the labels"),
        ([(torch.ones(2, 8), torch.ones(2))], r"a calibration batch is a tuple: expected a dict"),
        (
            [{"x": torch.full((1, 8), float("nan")), "labels": torch.tensor([0])}],
            r"the loss of a .* is nan: expected a",
        ),
        (
            [{"x": torch.zeros(0, 8), "labels": torch.zeros(0, dtype=torch.long)}],
            r"the loss of a .* is nan: expected a",
        ),
    ],
)
def test_unusable_batches_are_refused_before_any_change(criterion, batches, message):
    model = unusual(mlp())
    before, was = snapshot(model), state(model)
    with pytest.raises(CalibrationError, match=message.format(criterion)):
        prune(model, 0.5, criterion=criterion, calibration=batches)
    assert_unchanged(model, before)
    assert state(model) == was
    assert MaskStore.of(model) is None


def test_one_bad_batch_among_good_ones_is_refused():
    model = mlp()
    before = snapshot(model)
    bad = {"x": torch.full((1, 8), float("inf")), "labels": torch.tensor([0])}
    with pytest.raises(CalibrationError, match="expected a finite number"):
        prune(model, 0.5, criterion="taylor", calibration=[*tiny_batches(model), bad])
    assert_unchanged(model, before)


def test_a_generator_serves_once():
    model = mlp()
    batches = (batch for batch in tiny_batches(model))
    prune(model, 0.3, criterion="taylor", calibration=batches)
    before = snapshot(model)
    with pytest.raises(CalibrationError, match="a used-up generator yields none"):
        prune(model, 0.5, criterion="taylor", calibration=batches)
    assert_unchanged(model, before)


def test_gradients_that_are_not_finite_are_refused():
    model = Fixed(lambda weight: (weight * 0).sum().sqrt())
    with pytest.raises(
        CalibrationError, match=r"the gradient of fc\.weight is not finite: expected finite values; calibrate"
    ):
        collect(model, [{"x": torch.ones(1, 2)}])


def test_a_loss_that_depends_on_no_target_is_refused():
    model = Fixed(lambda weight: torch.ones(()))
    with pytest.raises(
        CalibrationError, match=r"depends on none of the weights to be pruned: check target_modules, and"
    ):
        collect(model, [{"x": torch.ones(1, 2)}])


def test_scores_that_are_not_finite_are_refused():
    """Two finite factors whose product is not: the statistics pass, the scores do not."""
    model = Fixed(lambda weight: (weight * 1e-10).sum() * 1e28)
    with torch.no_grad():
        model.fc.weight.copy_(torch.tensor([[1e25, -1e25], [1.0, 2.0]]))
    before = snapshot(model)
    with pytest.raises(
        CalibrationError, match=r"criterion 'taylor' gave scores that are not finite for fc\.weight: check"
    ):
        prune(model, 0.5, criterion="taylor", calibration=[{"x": torch.ones(1, 2)}])
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_are_float32_for_every_weight_dtype(dtype):
    model = mlp().to(dtype)
    batches = [{**batch, "x": batch["x"].to(dtype)} for batch in tiny_batches(model)]
    found = collect(model, batches, "snip")["fc1.weight"].gradient
    assert found.dtype == torch.float32
    expected = by_hand(mlp(), tiny_batches(model), absolute=False)["fc1.weight"]
    torch.testing.assert_close(found, expected, rtol=0.1, atol=2e-3)


def test_examples_are_counted_by_the_labels():
    """Inputs may be packed: their first dimension need not count the examples."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1, bias=False)

        def forward(self, packed, labels):
            return SimpleNamespace(loss=((self.linear(packed[0]) - labels[:, None]) ** 2).mean())

    torch.manual_seed(0)
    model, batches = Packed(), []
    for size in (1, 3):
        batches.append({"packed": torch.randn(1, size, 3), "labels": torch.randn(size)})
    plan = make_plan(model, PruningConfig(criterion="snip"))
    found = collect_stats(model, plan, batches)["linear.weight"].gradient
    whole = {
        "packed": torch.cat([b["packed"] for b in batches], 1),
        "labels": torch.cat([b["labels"] for b in batches]),
    }
    (expected,) = torch.autograd.grad(model(**whole).loss, [model.linear.weight])
    torch.testing.assert_close(found, expected)


def test_batch_without_tensors_is_refused():
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, flag):
            return SimpleNamespace(loss=self.linear.weight.sum())

    model = Constant()
    plan = make_plan(model, PruningConfig(criterion="snip"))
    with pytest.raises(CalibrationError, match=r"holds no tensors \(found: flag\)"):
        collect_stats(model, plan, [{"flag": True}])
