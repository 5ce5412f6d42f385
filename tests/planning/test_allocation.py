"""How much each tensor gives, by hand and by bisection."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_prune.errors import PlanError
from hf_prune.kernels.matrix import Target
from hf_prune.planning.allocation import allocate, erdos_renyi_kernel, minimize_total_error, outlier_sparsities
from tests.reference.pruning import reference_erk


def target(name: str, *shape: int) -> Target:
    return Target(f"{name}.weight", name, "linear" if len(shape) == 2 else "conv", shape)


TARGETS = [target("layer.0.query", 4, 4), target("layer.1.query", 4, 4), target("head", 2, 4)]


def test_uniform():
    assert allocate("uniform", 0.3, TARGETS) == {t.name: 0.3 for t in TARGETS}


def test_explicit_by_suffix_and_the_rest():
    found = allocate({"query": 0.2, "head": 0.0}, 0.7, TARGETS)
    assert found == {"layer.0.query.weight": 0.2, "layer.1.query.weight": 0.2, "head.weight": 0.0}
    found = allocate({"layer.1.query": 0.2}, 0.7, TARGETS)
    assert found == {"layer.0.query.weight": 0.7, "layer.1.query.weight": 0.2, "head.weight": 0.7}


@pytest.mark.parametrize("order", [("query", "0.query"), ("0.query", "query")])
def test_the_longest_name_counts_in_any_order(order):
    """JSON sorts the keys, so their order must mean nothing."""
    values = {"query": 0.1, "0.query": 0.9}
    found = allocate({name: values[name] for name in order}, 0.5, TARGETS)
    assert [found[t.name] for t in TARGETS] == [0.9, 0.1, 0.5]


@pytest.mark.parametrize("name", ["qeury", "ery", "layer.0", "weight", "head.weight"])
def test_a_name_that_matches_no_target_is_refused(name):
    with pytest.raises(
        PlanError, match=rf"allocation: unknown target module '{name}': expected one of layer\.0\.query, "
    ):
        allocate({"head": 0.1, name: 0.5}, 0.5, TARGETS)


def test_erk_by_hand():
    """Densities 20/100 and 40/400 times one scale: 20 + 40 weights at scale 1, and 250 of 500 are to stay."""
    targets = [target("a", 10, 10), target("b", 20, 20)]
    found = erdos_renyi_kernel(0.5, targets)
    scale = 250 / (20 + 40)
    assert found["a.weight"] == pytest.approx(1 - 0.2 * scale)  # 1/6
    assert found["b.weight"] == pytest.approx(1 - 0.1 * scale)  # 7/12
    assert found["a.weight"] * 100 + found["b.weight"] * 400 == pytest.approx(250)


def test_erk_caps_a_density_at_one_and_others_carry_its_share():
    """The small tensor would need a density of 2.19; it stays dense, and the large one keeps 83 of 400."""
    targets = [target("a", 2, 2), target("b", 20, 20)]
    found = erdos_renyi_kernel(0.76, targets)  # 0.24 * 404 = 96.96 stay
    assert found["a.weight"] == 0.0
    assert found["b.weight"] == pytest.approx(1 - (96.96 - 4) / 400)


def test_erk_caps_one_after_another():
    """280 of 2527 stay: at first only the density of the first is over 1, then that of the second as well."""
    targets = [target("a", 1, 2), target("b", 5, 5), target("c", 50, 50)]  # raw densities 3/2, 10/25, 100/2500
    assert 280 / (3 + 10 + 100) * 10 / 25 < 1 < (280 - 2) / (10 + 100) * 10 / 25
    found = erdos_renyi_kernel(1 - 280 / 2527, targets)
    assert found["a.weight"] == 0.0
    assert found["b.weight"] == 0.0
    assert found["c.weight"] == pytest.approx(1 - (280 - 27) / 2500)


def test_erk_counts_the_kernel():
    """(4 + 2 + 3 + 3) / 72 for a convolution, (6 + 6) / 36 for a matrix."""
    found = erdos_renyi_kernel(0.9, [target("conv", 4, 2, 3, 3), target("fc", 6, 6)])
    assert (1 - found["fc.weight"]) / (1 - found["conv.weight"]) == pytest.approx((12 / 36) / (12 / 72))


@given(st.floats(0, 1), st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=6))
def test_erk_equals_bisection_and_keeps_the_mean(sparsity, shapes):
    targets = [target(f"t{i}", *shape) for i, shape in enumerate(shapes)]
    found = erdos_renyi_kernel(sparsity, targets)
    assert all(0 <= value <= 1 for value in found.values())
    total = sum(t.size for t in targets)
    assert sum(found[t.name] * t.size for t in targets) == pytest.approx(sparsity * total, abs=1e-6 * total)
    assert found == pytest.approx(reference_erk(sparsity, targets), abs=1e-6)


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
def test_all_or_nothing(allocation):
    assert set(allocate(allocation, 1.0, TARGETS).values()) == {1.0}
    assert list(allocate(allocation, 0.0, TARGETS).values()) == pytest.approx([0.0] * 3)


# --- least total error ------------------------------------------------------------------------------


def curve(scale: float) -> list[tuple[float, float]]:
    return [(0.0, 0.0), *((s, scale * s**4) for s in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98))]


@given(
    st.lists(st.tuples(st.integers(1, 400), st.floats(1e-6, 1e6)), min_size=1, max_size=6),
    st.floats(0, 1),
)
def test_counts_add_up_and_keep_their_bounds(tensors, sparsity):
    units = {str(i): size for i, (size, _) in enumerate(tensors)}
    remove = round(sparsity * sum(units.values()))
    gone = {name: size // 10 for name, size in units.items()}
    least = gone if sum(gone.values()) <= remove else {}
    found = minimize_total_error({str(i): curve(scale) for i, (_, scale) in enumerate(tensors)}, units, remove, least)
    assert sum(found.values()) == remove
    assert all(least.get(name, 0) <= found[name] <= size for name, size in units.items())
    if remove <= 0.9 * sum(units.values()):
        assert all(found[name] <= 0.98 * size + 1 for name, size in units.items() if not least)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30), st.floats(1e-6, 1e6)), min_size=1, max_size=6),
    st.floats(0, 1),
)
def test_each_pool_loses_the_same(tensors, sparsity):
    pools = {str(i): rows for i, (rows, _, _) in enumerate(tensors)}
    units = {str(i): rows * columns for i, (rows, columns, _) in enumerate(tensors)}
    remove = round(sparsity * sum(units.values()))
    found = minimize_total_error({str(i): curve(s) for i, (_, _, s) in enumerate(tensors)}, units, remove, pools=pools)
    assert all(count % pools[name] == 0 and 0 <= count <= units[name] for name, count in found.items())
    assert remove - max(pools.values()) < sum(found.values()) <= remove


def test_the_sum_of_errors_is_smallest():
    """Against every other way, two per cent at a time."""
    units = {"a": 100, "b": 300}
    errors = {"a": curve(3.0), "b": curve(1.0)}
    found = minimize_total_error(errors, units, 240)

    def total(a: int) -> float:
        return 3.0 * (a / 100) ** 4 + ((240 - a) / 300) ** 4

    best = min(range(0, 99, 2), key=total)
    assert total(found["a"]) <= 1.02 * total(best)
    assert abs(found["a"] - best) <= 3


def test_a_tensor_that_costs_nothing_goes_up_to_the_cap():
    errors = {"free": curve(0.0), "dear": curve(1.0)}
    assert minimize_total_error(errors, {"free": 1000, "dear": 1000}, 980) == {"free": 980, "dear": 0}
    assert minimize_total_error(errors, {"free": 1000, "dear": 1000}, 1980) == {"free": 990, "dear": 990}


def test_a_curve_that_falls_is_made_convex():
    """A bump between two points must not stop what pays off behind it."""
    bump = [(0.0, 0.0), (0.3, 1.0), (0.5, 0.2), (0.9, 1.1), (0.98, 1.2)]
    steep = [(0.0, 0.0), (0.3, 0.9), (0.5, 2.0), (0.9, 9.0), (0.98, 20.0)]
    found = minimize_total_error({"bump": bump, "steep": steep}, {"bump": 100, "steep": 100}, 100)
    assert found["bump"] > 75


def test_outliers_spare_their_block_by_hand():
    """Shares 0.1 and 0.3, equal sizes: 0.7 ± 0.08; three to one: the mean stays."""
    found = outlier_sparsities({"a": 0.1, "b": 0.3}, {"a": 10, "b": 10}, 0.7)
    assert found == pytest.approx({"a": 0.78, "b": 0.62})
    found = outlier_sparsities({"a": 0.1, "b": 0.3}, {"a": 30, "b": 10}, 0.7)
    assert found == pytest.approx({"a": 0.74, "b": 0.58})
    assert (30 * found["a"] + 10 * found["b"]) / 40 == pytest.approx(0.7)
    assert outlier_sparsities({"a": 0.2, "b": 0.2}, {"a": 1, "b": 1}, 0.5) == {"a": 0.5, "b": 0.5}
    close = outlier_sparsities({"a": 0.0, "b": 1.0}, {"a": 1, "b": 1}, 0.99)
    assert close == pytest.approx({"a": 0.995, "b": 0.985})
