"""Groups by hand, and the reshapes that must agree with them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_prune.kernels.blocks import Group, Slice, block_sums, grid_groups, spread_blocks
from tests.reference.groups import group_scores, spread_groups


def test_grid_of_single_weights_goes_row_by_row():
    groups = list(grid_groups("w", (2, 2)))
    assert [g.slices[0].rows + g.slices[0].columns for g in groups] == [
        (0, 1, 0, 1),
        (0, 1, 1, 2),
        (1, 2, 0, 1),
        (1, 2, 1, 2),
    ]
    assert {g.pool for g in groups} == {"w"}


def test_grid_of_blocks():
    groups = list(grid_groups("w", (4, 6), (2, 3)))
    assert groups[1] == Group((Slice("w", (0, 2), (3, 6)),), "w")
    assert groups[2] == Group((Slice("w", (2, 4), (0, 3)),), "w")
    assert len(groups) == 4


def test_pools_are_runs_of_a_row():
    pools = [g.pool for g in grid_groups("w", (2, 4), pool=2)]
    assert pools == ["w[0, 0]"] * 2 + ["w[0, 1]"] * 2 + ["w[1, 0]"] * 2 + ["w[1, 1]"] * 2


def test_groups_across_tensors():
    """Two slices in two tensors live and die together; a tensor that nothing touches keeps all."""
    scores = {"a": torch.tensor([[1.0, 2.0], [4.0, 8.0]]), "b": torch.tensor([[16.0, 32.0]])}
    groups = [
        Group((Slice("a", (0, 1), (0, 2)), Slice("b", (0, 1), (0, 1))), "p"),
        Group((Slice("a", (1, 2), (0, 2)), Slice("b", (0, 1), (1, 2))), "p"),
    ]
    assert group_scores(groups, scores).tolist() == [19.0, 44.0]
    masks = spread_groups(groups, torch.tensor([False, True]), {"a": (2, 2), "b": (1, 2), "c": (1, 1)})
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [[False, False], [True, True]],
        "b": [[False, True]],
        "c": [[True]],
    }


def test_block_sums_by_hand():
    values = torch.arange(8.0).view(2, 4)
    assert block_sums(values, (2, 2)).tolist() == [[0 + 1 + 4 + 5, 2 + 3 + 6 + 7]]
    assert block_sums(values, (1, 4)).tolist() == [[6.0], [22.0]]
    assert block_sums(values, (1, 1)) is values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_sums_keep_the_dtype(dtype):
    assert block_sums(torch.ones(2, 2, dtype=dtype), (2, 1)).dtype == dtype


def test_spread_blocks_by_hand():
    keep = torch.tensor([[True, False]])
    assert spread_blocks(keep, (2, 2)).tolist() == [[True, True, False, False]] * 2
    assert spread_blocks(keep, (1, 1)) is keep


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_reshapes_equal_groups(units_out, units_in, rows, columns, seed, transposed):
    generator = torch.Generator().manual_seed(seed)
    shape = (units_out * rows, units_in * columns)
    values = torch.randint(-8, 8, shape, generator=generator).float()
    if transposed:
        values = values.t().contiguous().t()
    groups = list(grid_groups("w", shape, (rows, columns)))
    before = values.clone()
    assert torch.equal(block_sums(values, (rows, columns)).reshape(-1), group_scores(groups, {"w": values}))
    keep = torch.rand(units_out, units_in, generator=generator) < 0.5
    expected = spread_groups(groups, keep.reshape(-1), {"w": shape})["w"]
    assert torch.equal(spread_blocks(keep, (rows, columns)), expected)
    assert torch.equal(values, before)
