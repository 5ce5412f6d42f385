"""Exact selection: always what a stable sort would remove, whatever the sample says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.kernels import selection
from hf_prune.kernels.selection import keep_highest, keep_highest_per_row

INF = float("inf")
SMALL, LARGE = selection._SAMPLE, selection.CHUNK


def by_sort(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The definition: the first k of a stable ascending sort go."""
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    keep[torch.sort(scores.reshape(-1), stable=True).indices[:k]] = False
    return keep


def check(parts: list[torch.Tensor], k: int, chunk: int | None = None) -> None:
    """keep_highest on parts, each given whole or in chunks, against one stable sort of them all."""
    copies = [part.clone() for part in parts]
    functions = [(lambda p=p: p.split(chunk)) if chunk else (lambda p=p: iter([p])) for p in parts]
    masks = keep_highest(functions, [p.numel() for p in parts], k)
    assert [mask.shape for mask in masks] == [(p.numel(),) for p in parts]
    assert {mask.dtype for mask in masks} == {torch.bool}
    kept = torch.cat(masks)
    assert int((~kept).sum()) == k
    assert torch.equal(kept, by_sort(torch.cat([p.reshape(-1) for p in parts]), k))
    assert all(torch.equal(part, copy) for part, copy in zip(parts, copies, strict=True))


def distribution(kind: str, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(size, generator=generator).abs()
    if kind == "ties":
        return (scores * 3).round()
    if kind == "constant":
        return torch.full((size,), 0.25)
    if kind == "gone":  # half was removed earlier
        return scores.masked_fill(torch.rand(size, generator=generator) < 0.5, -INF)
    if kind == "zeros":
        return scores.masked_fill(torch.rand(size, generator=generator) < 0.7, 0.0)
    if kind == "signed zeros":
        return (torch.rand(size, generator=generator) < 0.5).float().sub(1).mul(0.0)
    if kind == "rising":
        return torch.arange(size).float()
    if kind == "falling":
        return -torch.arange(size).float()
    if kind == "spikes":  # a few values far away from the rest, where a sample rarely looks
        return scores.masked_fill(torch.rand(size, generator=generator) < 2 / max(size, 1), 1e30)
    if kind == "subnormal":
        return scores * 1e-41
    assert kind == "normal"
    return scores


KINDS = ["normal", "ties", "constant", "gone", "zeros", "signed zeros", "rising", "falling", "spikes", "subnormal"]


def test_by_hand():
    """Of the four ones, the first two go; the larger stay."""
    scores = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0, 1.0])
    (mask,) = keep_highest([lambda: [scores]], [6], 2)
    assert mask.tolist() == [False, True, False, True, True, True]


def test_ties_across_parts_go_from_the_first_part():
    a, b = torch.tensor([5.0, 1.0]), torch.tensor([[1.0], [1.0]])
    masks = keep_highest([lambda: [a], lambda: [b]], [2, 2], 2)
    assert [mask.tolist() for mask in masks] == [[True, False], [False, True]]


@given(
    st.lists(st.lists(st.sampled_from([-INF, -1.0, -0.0, 0.0, 0.5, 2.0]), min_size=1), min_size=1, max_size=4),
    st.data(),
)
def test_small_pools_with_ties(parts, data):
    k = data.draw(st.integers(0, sum(map(len, parts))))
    check([torch.tensor(part) for part in parts], k, data.draw(st.sampled_from([None, 1, 3])))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60), st.data())
def test_any_numbers(scores, data):
    check([torch.tensor(scores, dtype=torch.float32)], data.draw(st.integers(0, len(scores))))


@settings(max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([1, 2, SMALL - 1, SMALL, SMALL + 1, SMALL + 700, 3 * SMALL, LARGE, LARGE + 1]),
    st.floats(0, 1),
    st.integers(1, 4),
    st.sampled_from([None, 1000, LARGE]),
)
def test_sizes_around_the_sample(kind, size, share, parts, chunk):
    scores = distribution(kind, size)
    check(list(scores.tensor_split(min(parts, size))), round(share * size), chunk)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 2, 40_000, 59_998, 59_999, 60_000])
def test_every_distribution_up_to_the_ends(kind, k):
    check([distribution(kind, 60_000)], k)


@pytest.mark.parametrize("kind", ["normal", "ties", "gone"])
def test_parts_of_very_different_sizes_and_scales(kind):
    parts = [
        distribution(kind, 50_000),
        distribution(kind, 3) * 1e6,
        distribution(kind, 20_000, 1).mul(1e-6).view(100, 200),
    ]
    for k in (1, 20_000, 35_001, 70_002):
        check(parts, k, 4096)


# A sample that says nothing, or nothing true, about the scores.
LIES = {
    "all too low": lambda parts, total: np.full(200, -1e30, np.float32),
    "all too high": lambda parts, total: np.full(200, 1e30, np.float32),
    "one value": lambda parts, total: np.zeros(1, np.float32),
    "lowest ones": lambda parts, total: np.sort(np.concatenate([c.reshape(-1) for p in parts for c in p()]))[:300],
    "highest ones": lambda parts, total: np.sort(np.concatenate([c.reshape(-1) for p in parts for c in p()]))[-300:],
    "gone": lambda parts, total: np.full(200, -np.inf, np.float32),
    "infinite": lambda parts, total: np.full(200, np.inf, np.float32),
    "both ends": lambda parts, total: np.array([-np.inf] * 100 + [np.inf] * 100, np.float32),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("kind", ["normal", "ties", "gone", "constant"])
def test_a_misleading_sample_changes_nothing(monkeypatch, lie, kind):
    monkeypatch.setattr(selection, "_sample", LIES[lie])
    scores = distribution(kind, 5000)
    for k in (1, 299, 300, 2500, 4700, 4999):
        check([scores[:1000], scores[1000:]], k, 300)


def test_a_missed_bracket_falls_back_once(monkeypatch):
    brackets = []
    threshold = selection._threshold

    def spy(parts, k, low, high):
        brackets.append((low, high))
        return threshold(parts, k, low, high)

    monkeypatch.setattr(selection, "_threshold", spy)
    monkeypatch.setattr(selection, "_sample", LIES["all too high"])
    check([distribution("normal", 5000)], 2500)
    assert brackets == [(pytest.approx(1e30), pytest.approx(1e30)), (-INF, INF)]


def test_the_sample_usually_brackets_so_little_is_collected(monkeypatch):
    """The speed rests on this; the result does not."""
    found = []
    bracket = selection._bracket
    monkeypatch.setattr(selection, "_bracket", lambda *a: found.append(bracket(*a)) or found[-1])
    scores = distribution("normal", 400_000)
    for k in (4_000, 200_000, 396_000):
        check([scores], k)
    for (low, high), k in zip(found, (4_000, 200_000, 396_000), strict=True):
        threshold = scores.sort().values[k - 1]
        assert low <= threshold <= high
        assert int(((scores > low) & (scores < high)).sum()) < 0.1 * len(scores)


def test_functions_are_called_at_most_four_times():
    calls = []
    scores = distribution("ties", 30_000)

    def part():
        calls.append(1)
        return [scores]

    keep_highest([part], [30_000], 10_000)
    assert len(calls) <= 4


@given(
    st.integers(1, 9),
    st.sampled_from([1, 2, 3, 4, 16, 31, 32, 33, 40, 100]),
    st.integers(1, 5),
    st.integers(0, 99),
    st.data(),
)
def test_rows_are_pools(pools, units, levels, seed, data):
    k = data.draw(st.integers(0, units))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (pools, units), generator=generator).float()
    scores = scores.masked_fill(torch.rand(scores.shape, generator=generator) < 0.2, -INF)
    before = scores.clone()
    expected = torch.stack([by_sort(row, k) for row in scores])
    for few in (selection._FEW_SCORES, 0):  # by sorting, and as if there were many
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selection, "_FEW_SCORES", few)
            keep = keep_highest_per_row(scores, k)
        assert keep.dtype == torch.bool
        assert torch.equal(keep, expected)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("units", [4, 32, 33, 70_000])
def test_rows_in_several_chunks(units):
    pools = LARGE // units * 2 + 3
    scores = torch.randint(0, 3, (pools, units), generator=torch.Generator().manual_seed(1)).float()
    keep = keep_highest_per_row(scores, units // 2)
    order = torch.sort(scores, dim=1, stable=True).indices[:, : units // 2]
    assert torch.equal(keep, torch.ones_like(keep).scatter_(1, order, False))


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "gone", "zeros"])
@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.9, 1])
def test_a_threshold_and_its_ties_give_the_same_masks_part_by_part(kind, share):
    parts = [distribution(kind, size, seed) for seed, size in enumerate((5_000, 1, 70_000, 300))]
    functions = [lambda p=p: p.split(999) for p in parts]
    sizes = [len(p) for p in parts]
    k = round(share * sum(sizes))
    threshold, ties = selection.find_threshold(functions, sizes, k)
    masks = [selection.keep_above(*each, threshold, kept) for *each, kept in zip(functions, sizes, ties, strict=True)]
    assert torch.equal(torch.cat(masks), by_sort(torch.cat(parts), k))


def test_the_largest_sample_bounds_what_is_drawn(monkeypatch):
    monkeypatch.setattr(selection, "_LARGEST_SAMPLE", 100)
    scores = distribution("normal", 200_000)
    assert len(selection._sample([lambda: scores.split(5_000)], 200_000)) <= 100 + 40
    check([scores], 77_777, 5_000)
