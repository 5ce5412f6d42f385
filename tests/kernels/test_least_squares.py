"""Least squares on a support: equal to an exact solver, never worse than where it starts."""

import pytest
import torch

from hf_prune.errors import CalibrationError, ConfigError
from hf_prune.kernels.least_squares import (
    cholesky_factor,
    damped,
    inverse_factor_,
    layer_error,
    layer_errors,
    least_squares,
    refit,
    with_output_correction,
)
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.targets import bias_names, resolve_targets
from hf_prune.pruning.mask_store import MaskStore
from tests import models
from tests.models import same_bits, snapshot, tiny_batches
from tests.reference.reconstruction import reference_error, reference_least_squares


def problem(rows: int = 5, columns: int = 8, tokens: int = 60, seed: int = 0, dtype: torch.dtype = torch.float64):
    """A weight, correlated inputs and their mean outer product."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=dtype)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=dtype) @ mix
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    return weight, inputs, inputs.t() @ inputs / tokens


@pytest.mark.parametrize("seed", range(4))
def test_it_equals_an_exact_solver(seed):
    weight, inputs, gram = problem(seed=seed)
    keep = torch.rand(weight.shape) < 0.5
    found = least_squares(weight, keep, gram, iterations=200)
    torch.testing.assert_close(found, reference_least_squares(weight, keep, inputs), rtol=1e-5, atol=1e-6)
    assert not found[~keep].any()


def test_by_hand():
    """Two equal inputs: what stays takes over what goes."""
    gram = torch.tensor([[1.0, 1.0], [1.0, 1.0]]) + 1e-6 * torch.eye(2)
    found = least_squares(torch.tensor([[2.0, 3.0]]), torch.tensor([[True, False]]), gram)
    torch.testing.assert_close(found, torch.tensor([[5.0, 0.0]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("iterations", [0, 1, 2, 5, 30])
def test_more_iterations_are_never_worse(iterations):
    weight, _, gram = problem(rows=20, columns=24, dtype=torch.float32)
    keep = torch.rand(weight.shape) < 0.3
    errors = [float(layer_error(weight, least_squares(weight, keep, gram, iterations=i), gram)) for i in range(32)]
    assert errors[iterations + 1] <= errors[iterations] * (1 + 1e-4)
    assert errors[0] == pytest.approx(float(layer_error(weight, weight * keep, gram)))


def test_a_start_that_is_solved_stays():
    weight, _, gram = problem()
    keep = torch.rand(weight.shape) < 0.5
    best = least_squares(weight, keep, gram, iterations=200)
    torch.testing.assert_close(least_squares(weight, keep, gram, start=best), best)


def test_nothing_removed_changes_nothing():
    weight, _, gram = problem()
    assert same_bits(least_squares(weight, torch.ones_like(weight, dtype=torch.bool), gram), weight)
    assert not least_squares(weight, torch.zeros_like(weight, dtype=torch.bool), gram).any()


def test_the_layer_error_is_that_of_the_outputs():
    weight, inputs, gram = problem()
    new = torch.randn_like(weight)
    assert float(layer_error(weight, new, gram)) == pytest.approx(reference_error(weight, new, inputs))


def test_the_error_of_each_output():
    weight, inputs, gram = problem()
    new = torch.randn_like(weight)
    expected = ((inputs @ (new - weight).t()) ** 2).mean(0)
    torch.testing.assert_close(layer_errors(weight, new, gram), expected)


@pytest.mark.parametrize("seed", range(3))
def test_weights_and_bias_are_solved_together(seed):
    """As by least squares with one more input that is always one and never removed."""
    weight, inputs, _ = problem(seed=seed)
    inputs = inputs + torch.randn(inputs.shape[1])
    bias, lacks = torch.randn(len(weight)).double(), torch.randn(len(inputs), len(weight)).double() / 10
    keep = torch.rand(weight.shape) < 0.6
    goal = inputs @ weight.t() + bias + lacks
    ones = torch.cat([inputs, torch.ones(len(inputs), 1).double()], 1)
    gram, mean = inputs.t() @ inputs / len(inputs), inputs.mean(0)
    change, products = lacks.mean(0), lacks.t() @ inputs / len(inputs)
    found, new_bias = refit(weight, keep, gram, mean, bias, change, products)
    assert not found[~keep].any()
    error = ((inputs @ found.t() + new_bias - goal) ** 2).mean(0)
    for i in range(len(weight)):
        support = torch.cat([keep[i], torch.tensor([True])]).nonzero().squeeze(1)
        best = torch.linalg.lstsq(ones[:, support], goal[:, i : i + 1]).solution
        least = float(((ones[:, support] @ best - goal[:, i : i + 1]) ** 2).mean())
        assert least <= float(error[i]) <= 1.1 * least + 1e-3 * float(goal[:, i].var())
    plain, none = refit(weight, keep, gram, products=products)
    assert none is None
    assert ((inputs @ plain.t() + bias - goal) ** 2).mean() > error.mean()


def test_corrections_make_up_for_what_the_outputs_lack():
    weight, inputs, gram = problem(tokens=400)
    wanted = torch.randn_like(weight)
    lacks = inputs @ (wanted - weight).t()
    found = with_output_correction(weight, gram, lacks.t() @ inputs / len(inputs), share=1e-9)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    half = with_output_correction(weight, gram, lacks.t() @ inputs / len(inputs))
    assert 0 < float((half - weight).norm()) < float((wanted - weight).norm())


def test_damping_makes_a_singular_matrix_invertible():
    assert torch.equal(damped(torch.zeros(2, 2)), torch.eye(2))
    gram = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(damped(gram), torch.tensor([[4.02, 0.0], [0.0, 0.02]]))
    assert gram[1, 1] == 0


@pytest.mark.parametrize("criterion", ["magnitude", "random", "wanda", "taylor", "sparsegpt"])
@pytest.mark.parametrize("granularity", ["unstructured", "2:4", "block:2x2"])
def test_it_wraps_any_criterion_and_lowers_the_error_of_a_layer(criterion, granularity):
    settings = {"criterion": criterion, "granularity": granularity, "target_modules": ["fc1"]}
    batches = tiny_batches(models.mlp(), sizes=(16, 16))
    gram = sum(batch["x"].t() @ batch["x"] for batch in batches) / 32
    dense = models.mlp().fc1.weight.detach()
    plain = prune(models.mlp(), **settings, calibration=batches)
    repaired = prune(models.mlp(), **settings, calibration=batches, repair="least_squares")
    mask = MaskStore.of(plain).masks["fc1.weight"]
    assert torch.equal(mask, MaskStore.of(repaired).masks["fc1.weight"])
    assert not repaired.fc1.weight[~mask].any()
    errors = [float(layer_error(dense, m.fc1.weight.detach(), gram)) for m in (plain, repaired)]
    assert errors[1] < errors[0] * (1 + 1e-3 if criterion == "sparsegpt" else 0.999)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "albert", "resnet"])
def test_only_targets_change_and_the_dense_weights_come_back(kind):
    model = models.TRANSFORMERS[kind]()
    before = snapshot(model)
    prune(model, 0.5, calibration=tiny_batches(model), repair="least_squares", keep_dense=True)
    masks = MaskStore.of(model).masks
    biases = set(bias_names(model, resolve_targets(model, PruningConfig())).values())
    for name, parameter in model.named_parameters():
        if name in masks:
            assert not parameter[~masks[name]].any()
        else:
            assert same_bits(parameter, before[name]) != (name in biases)
    assert any(not torch.equal(p[masks[n]], before[n][masks[n]]) for n, p in model.named_parameters() if n in masks)
    MaskStore.of(model).discard(model)
    models.assert_unchanged(model, before)


@pytest.mark.parametrize("order", ["sequential", "one_pass"])
@pytest.mark.parametrize(
    "settings",
    [
        {"scope": "global"},
        {"scope": "global", "criterion": "taylor"},
        {"criterion": "fisher"},
        {"criterion": "fisher", "scope": "global"},
        {"criterion": "fisher_diagonal", "scope": "row"},
    ],
)
def test_it_repairs_masks_that_are_made_before(settings, order):
    """The masks are those without a repair; what stays is solved anew for the dense outputs."""
    batches = tiny_batches(models.tiny_bert(), sizes=(4, 4))
    plain = prune(models.tiny_bert(), 0.5, calibration=batches, **settings)
    repair = {"repair": "least_squares", "calibration_order": order}
    repaired = prune(models.tiny_bert(), 0.5, calibration=batches, **repair, **settings)
    masks = MaskStore.of(plain).masks
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert all(torch.equal(mask, MaskStore.of(repaired).masks[n]) for n, mask in masks.items())
    assert all(not repaired.get_parameter(n)[~mask].any() for n, mask in masks.items())
    assert not torch.equal(plain.get_parameter(name), repaired.get_parameter(name))
    if "fisher" not in settings.get("criterion", ""):
        dense = models.tiny_bert().get_parameter(name)
        assert torch.equal(plain.get_parameter(name), dense * masks[name])


def test_an_earlier_mask_stays():
    model = prune(models.mlp(), 0.3, criterion="random")
    early = {name: mask.clone() for name, mask in MaskStore.of(model).masks.items()}
    prune(model, 0.6, calibration=tiny_batches(model), repair="least_squares")
    for name, mask in early.items():
        assert not model.get_parameter(name)[~mask].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repair": "least_square"}, r"unknown repair 'least_square': .*Did you mean 'least_squares'"),
        (
            {"repair": "least_squares", "criterion": "taylor", "steps": 2},
            r"steps=2 contradicts repair='least_squares', which reproduces the outputs of dense layers",
        ),
        ({"calibration_order": "backwards"}, r"unknown calibration_order 'backwards': expected one of"),
        ({"criterion": "sparsegpt", "scope": "global"}, r"criterion 'sparsegpt' cannot rank in scope 'global'"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        PruningConfig(**settings)


def test_configs_of_before_still_load():
    values = PruningConfig(0.3).to_dict()
    del values["repair"], values["calibration_order"]
    assert PruningConfig.from_dict(values) == PruningConfig(0.3)
    config = PruningConfig(0.3, repair="least_squares", calibration_order="one_pass")
    assert PruningConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 600])
def test_the_factor_of_the_inverse(size):
    generator = torch.Generator().manual_seed(size)
    inputs = torch.randn(size + 20, size, generator=generator, dtype=torch.float64)
    gram = damped(inputs.t() @ inputs / len(inputs))
    work = gram.clone()
    factor = inverse_factor_(work)
    assert factor is work  # in its place
    assert not factor.tril(-1).any()
    assert bool((factor.diagonal() > 0).all())
    torch.testing.assert_close(factor.t() @ factor @ gram, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-9)


def test_what_has_no_inverse_has_no_factor():
    with pytest.raises(torch.linalg.LinAlgError):
        inverse_factor_(-torch.eye(3))


def test_damping_in_another_dtype_leaves_the_matrix_alone():
    gram = torch.eye(3)
    assert damped(gram, dtype=torch.float64).dtype == torch.float64
    assert torch.equal(gram, torch.eye(3))


def test_a_matrix_spoilt_by_rounding_is_damped_more():
    spoilt = torch.eye(3).double()
    spoilt[0, 0] = -0.2  # what is left of a variance after a large mean was subtracted
    factor = cholesky_factor(spoilt)
    assert torch.allclose(factor @ factor.t(), damped(spoilt, 1.0))  # 0.01 and 0.1 of the mean diagonal were too little
    good = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    assert torch.allclose(cholesky_factor(good) @ cholesky_factor(good).t(), damped(good))
    with pytest.raises(CalibrationError, match="cannot be factored"):
        cholesky_factor(torch.full((2, 2), torch.nan).double())
