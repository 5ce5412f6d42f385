"""How close ALPS and SparseGPT come to the best masks, which small layers let us enumerate, and to exact OBS."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.kernels.least_squares import damped, layer_error, least_squares
from tests.contracts.test_layerwise_criteria import run
from tests.kernels.test_least_squares import problem
from tests.reference.reconstruction import (
    reference_best_rows,
    reference_error,
    reference_least_squares,
    reference_obs,
    reference_sparsegpt,
)
from tests.reference.sparsegpt import published_sparsegpt

SEEDS = range(8)


def rows_by_method(seed: int, k: int) -> dict[str, list[float]]:
    """The error of every row of 6 x 6 weights without ``k`` weights in each, solved exactly on the mask of a method."""
    weight, inputs, gram = problem(rows=6, columns=6, tokens=100, seed=seed)
    masks = {name: run(name, weight, gram, k / 6, scope="row")[0] for name in ("magnitude", "sparsegpt", "alps")}
    masks["obs"] = torch.stack([reference_obs(row, gram, k)[0] for row in weight])
    masks["best"] = reference_best_rows(weight, inputs, k) != 0
    assert all(mask.sum(1).tolist() == [6 - k] * 6 for mask in masks.values())
    solved = {name: reference_least_squares(weight, mask, inputs) for name, mask in masks.items()}
    return {
        name: [reference_error(weight[i : i + 1], new[i : i + 1], inputs) for i in range(6)]
        for name, new in solved.items()
    }


@pytest.mark.parametrize("k", [2, 3, 4])
def test_masks_of_small_layers_against_all_masks(k):
    found = [rows_by_method(seed, k) for seed in SEEDS]
    rows = {name: [error for errors in found for error in errors[name]] for name in found[0]}
    for name in rows:
        assert all(error >= best * (1 - 1e-9) for error, best in zip(rows[name], rows["best"], strict=True))

    def beyond(name: str) -> float:
        return sum(rows[name]) / sum(rows["best"])

    optimal = sum(a <= b * (1 + 1e-6) for a, b in zip(rows["alps"], rows["best"], strict=True)) / len(rows["best"])
    assert optimal > 0.5
    assert beyond("alps") < 1.5
    assert beyond("obs") < 1.5
    assert beyond("sparsegpt") < 4
    assert beyond("alps") < beyond("sparsegpt")
    assert beyond("alps") < beyond("magnitude")


@pytest.mark.parametrize("seed", range(4))
def test_exact_obs_removes_greedily_and_solves_least_squares(seed):
    """The twin itself: its removals are those of trying each, its weights those of solving anew."""
    weight, inputs, gram = problem(rows=1, columns=7, tokens=50, seed=seed)
    keep, new = reference_obs(weight[0], gram, 4)
    torch.testing.assert_close(new[None], reference_least_squares(weight, keep[None], inputs), rtol=1e-6, atol=1e-8)
    left = torch.ones(1, 7, dtype=torch.bool)
    for _ in range(4):
        tried = {}
        for j in left[0].nonzero().flatten().tolist():
            mask = left.clone()
            mask[0, j] = False
            tried[j] = reference_error(weight, reference_least_squares(weight, mask, inputs), inputs)
        left[0, min(tried, key=tried.__getitem__)] = False
    assert torch.equal(left[0], keep)


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_alps_is_no_worse_than_exact_obs_on_layers_of_32_inputs(sparsity):
    """Greedy removal never takes a weight back, ADMM does: over several layers its error is smaller."""
    errors = {"obs": 0.0, "alps": 0.0, "sparsegpt": 0.0}
    for seed in range(4):
        weight, _, gram = problem(rows=8, columns=32, tokens=200, seed=seed)
        obs = torch.stack([reference_obs(row, damped(gram), round(32 * sparsity))[1] for row in weight])
        errors["obs"] += float(layer_error(weight, obs, gram))
        for name in ("alps", "sparsegpt"):
            errors[name] += float(layer_error(weight, run(name, weight, gram, sparsity, scope="row")[1], gram))
    assert errors["alps"] < errors["obs"]
    assert errors["obs"] < errors["sparsegpt"]


SHAPES = st.tuples(st.integers(1, 8), st.sampled_from([4, 8, 12, 24]), st.integers(2, 60))


@given(shape=SHAPES, seed=st.integers(0, 10_000), amount=st.sampled_from(["row", "layer", "2:4", "block:1x2"]))
@settings(max_examples=150)
def test_alps_is_never_worse_than_magnitude_and_least_squares(shape, seed, amount):
    """In layer error, whatever the inputs: few tokens, many outputs, all granularities."""
    rows, columns, tokens = shape
    weight, _, gram = problem(rows, columns, tokens, seed, torch.float32)
    options = {"scope": amount} if amount in ("row", "layer") else {"granularity": amount}
    for sparsity in (0.25, 0.5, 0.75):
        keep, _ = run("magnitude", weight, gram, sparsity, **options)
        solved = layer_error(weight, least_squares(weight, keep, damped(gram)), gram)
        alps = layer_error(weight, run("alps", weight, gram, sparsity, **options)[1], gram)
        assert float(alps) <= float(solved) * (1 + 1e-4) + 1e-6 * float(layer_error(weight, 0 * weight, gram))


@pytest.mark.parametrize("pool", [None, (2, 4)])
def test_the_published_algorithm_in_matrices_equals_its_elementwise_twin(pool):
    weight, _, gram = problem(rows=4, columns=136, tokens=400, dtype=torch.float32)
    keep, new = published_sparsegpt(weight, gram, 0.5, pool=pool)
    expected_keep, expected = reference_sparsegpt(weight, gram, 0.5, pool=pool)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(new, expected.float(), rtol=1e-2, atol=1e-3)
