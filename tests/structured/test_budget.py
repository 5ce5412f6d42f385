"""Sizes under a budget, against enumeration."""

import itertools

import numpy as np
import pytest

from hf_prune import PruningConfig, prune
from hf_prune.errors import PlanError
from hf_prune.structured.budget import Choice, Costs, allowed_sizes, solve_budget, uniform_sizes
from tests import models


def problem(seed, sites=3, units=4, convex=True):
    rng = np.random.default_rng(seed)
    losses, costs = {}, {}
    for i in range(sites):
        steps = rng.random(units)
        losses[f"s{i}"] = np.append(np.cumsum(np.sort(steps) if convex else steps)[::-1], 0.0)
        costs[f"s{i}"] = np.cumsum(np.append(0.0, rng.random(units) + 0.1))
    return losses, Costs(1.0, costs)


def total(losses, kept):
    return sum(losses[name][n] for name, n in kept.items())


def best(losses, costs, budget, sizes):
    found = np.inf
    for numbers in itertools.product(*sizes.values()):
        kept = dict(zip(sizes, map(int, numbers), strict=True))
        if costs.total(kept) <= budget:
            found = min(found, total(losses, kept))
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_close_to_the_best_of_all_choices(seed, share):
    losses, costs = problem(seed, convex=seed % 2 == 0)
    sizes = {name: allowed_sizes(4, 0, 1) for name in losses}
    budget = costs.base + share * (costs.total({}) - costs.base)
    choice = solve_budget(losses, costs, budget, sizes)
    assert costs.total(choice.kept) <= budget
    largest = max(float(np.max(-np.diff(loss))) for loss in losses.values())
    assert total(losses, choice.kept) <= best(losses, costs, budget, sizes) + largest


def test_equal_costs_take_the_worthless_units():
    losses = {"a": np.array([6.0, 3.0, 1.0, 0.0]), "b": np.array([30.0, 20.0, 10.0, 0.0])}
    costs = Costs(0.0, {name: np.arange(4.0) for name in losses})
    sizes = {name: allowed_sizes(3, 0, 1) for name in losses}
    assert solve_budget(losses, costs, 4, sizes).kept == {"a": 1, "b": 3}
    assert solve_budget(losses, costs, 6, sizes).kept == {"a": 3, "b": 3}
    assert solve_budget(losses, costs, 100, sizes).kept == {"a": 3, "b": 3}
    assert solve_budget(losses, costs, 0, sizes).kept == {"a": 0, "b": 0}


def test_layers_compete_with_their_units():
    losses = {"a": np.array([4.0, 1.0, 0.0]), "b": np.array([9.0, 5.0, 0.0])}
    costs = Costs(0.0, {name: np.arange(3.0) for name in losses}, {"first": 3.0, "second": 3.0})
    sizes = {name: allowed_sizes(2, 0, 1) for name in losses}
    members = {"first": ["a"], "second": ["b"]}
    cheap = solve_budget(losses, costs, 6.0, sizes, members, {"first": 0.5, "second": 50.0})
    assert cheap == Choice({"a": 0, "b": 2}, frozenset({"first"}))
    assert costs.total(cheap.kept, cheap.layers, members) == 5.0
    dear = solve_budget(losses, costs, 9.0, sizes, members, {"first": 50.0, "second": 50.0})
    assert dear == Choice({"a": 1, "b": 2}, frozenset())


def test_sizes_that_are_allowed():
    assert allowed_sizes(10, 0, 4).tolist() == [0, 4, 8, 10]
    assert allowed_sizes(10, 1, 4).tolist() == [4, 8, 10]
    assert allowed_sizes(3, 1, 8).tolist() == [3]
    assert allowed_sizes(3, 1, 1).tolist() == [1, 2, 3]


def test_only_allowed_sizes_are_chosen():
    losses, costs = problem(0, units=20)
    sizes = {name: allowed_sizes(20, 1, 8) for name in losses}
    choice = solve_budget(losses, costs, costs.base + 0.5 * (costs.total({}) - costs.base), sizes)
    assert all(n in sizes[name] for name, n in choice.kept.items())


def test_a_budget_that_cannot_be_met():
    losses, costs = problem(0)
    sizes = {name: allowed_sizes(4, 1, 1) for name in losses}
    with pytest.raises(PlanError, match=r"budget of 0\.5 cannot be met.*still costs"):
        solve_budget(losses, costs, 0.5, sizes)
    with pytest.raises(PlanError, match=r"budget of 0\.5 cannot be met.*still costs.*ask for less, or pay$"):
        uniform_sizes(costs, 0.5, sizes, ", or pay")


@pytest.mark.parametrize("granularity", [("head",), ("head", "layer")])
@pytest.mark.parametrize("target", [{"target_params": 0.01}, {"target_speedup": 50.0, "workload": {"length": 8}}])
def test_layers_are_named_as_a_way_out_only_where_they_may_not_go_yet(granularity, target):
    with pytest.raises(PlanError, match="ask for less") as refused:
        prune(models.tiny_classifier(), PruningConfig(granularity=granularity, **target))
    assert ("add 'layer' to the granularity" in str(refused.value)) is ("layer" not in granularity)


def test_uniform_takes_the_same_share_everywhere():
    costs = Costs(0.0, {"a": np.arange(11.0), "b": 2 * np.arange(21.0)})
    sizes = {"a": allowed_sizes(10, 0, 1), "b": allowed_sizes(20, 0, 1)}
    assert uniform_sizes(costs, 25.0, sizes) == {"a": 5, "b": 10}
    assert uniform_sizes(costs, 50.0, sizes) == {"a": 10, "b": 20}
    assert uniform_sizes(costs, 0.0, sizes) == {"a": 0, "b": 0}


def test_giving_units_back_looks_at_no_site_again_that_got_none():
    """Sites that are all alike lose all or nothing at a price, and half of their units are given back one by one."""

    class Counting(dict):
        looks = 0

        def __getitem__(self, key):
            self.looks += 1
            return super().__getitem__(key)

    found = []
    for number in (8, 16, 32):
        losses = {f"{i}": np.arange(8.0, -1, -1) for i in range(number)}
        sites = Counting({name: np.arange(9.0) for name in losses})
        choice = solve_budget(losses, Costs(0.0, sites), 4 * number, {name: allowed_sizes(8, 0, 1) for name in losses})
        assert sum(choice.kept.values()) == 4 * number
        found.append(sites.looks / number)
    assert max(found) < 1.1 * min(found)
