"""The formats for few tokens and for blocks: against dense products on odd shapes, and refused if damaged."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from hf_prune.kernels.sparse.bit_rows import BitRows
from hf_prune.kernels.sparse.row_blocks import RowBlocks
from hf_prune.kernels.sparse.slices import SlicedRows
from hf_prune.kernels.sparse.sparse_rows import SparseRows

pytestmark = pytest.mark.usefixtures("kernel")
FORMATS = (SlicedRows, BitRows, RowBlocks)
SHAPES = [(1, 1), (5, 17), (16, 16), (33, 100), (64, 48), (50, 1000)]
TOKENS = (1, 2, 3, 4, 5, 8, 16, 17, 33, 100)


def matrix(outputs, inputs, sparsity, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight *= torch.rand(outputs, inputs, generator=generator) >= sparsity
    if outputs > 4:
        weight[1], weight[3] = 0, torch.randn(inputs, generator=generator)  # an empty row, and a full one
    return weight


def expected(x, weight, bias=None):
    product = x.double() @ weight.double().t()
    return product if bias is None else product + bias.double()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
def test_products_on_odd_shapes(level, form, shape, sparsity):
    weight, bias = matrix(*shape, sparsity), torch.randn(shape[0])
    stored = form.from_dense(weight)
    assert torch.equal(stored.to_dense(), weight)
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1]) / shape[1] ** 0.5
        for b in (bias, None):
            found = stored.linear(x, b, level)
            torch.testing.assert_close(found.double(), expected(x, weight, b), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", [*FORMATS, SparseRows])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_sum_in_float32(level, form, dtype):
    weight, bias = matrix(40, 200, 0.7).to(dtype), torch.randn(40).to(dtype)
    stored = form.from_dense(weight)
    assert torch.equal(stored.to_dense(), weight)
    assert stored.values.dtype == dtype
    for tokens in (1, 2, 3, 4, 7, 20):
        x = torch.randn(tokens, 200).to(dtype)
        found = stored.linear(x, bias, level)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected(x, weight, bias).to(dtype), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("form", FORMATS)
def test_a_thousand_tokens_on_several_threads(form):
    weight, x, before = matrix(130, 300, 0.8), torch.randn(1000, 300), torch.get_num_threads()
    stored, results = form.from_dense(weight), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(stored.linear(x))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0].double(), expected(x, weight), atol=1e-4, rtol=1e-4)
    assert torch.equal(*results)  # the order of sums does not depend on the threads


@pytest.mark.parametrize("form", FORMATS)
def test_views_no_tokens_and_no_outputs(form):
    weight = matrix(20, 30, 0.6)
    stored, x = form.from_dense(weight), torch.randn(30, 5, 4).permute(1, 2, 0)  # not contiguous
    torch.testing.assert_close(stored.linear(x).double(), expected(x, weight), atol=1e-4, rtol=1e-4)
    assert stored.linear(x[:0]).shape == (0, 4, 20)
    assert stored.linear(x[0, 0]).shape == (20,)
    assert form.from_dense(torch.empty(0, 30)).linear(x).shape == (5, 4, 0)
    assert form.from_dense(torch.empty(3, 0)).linear(torch.empty(2, 0), torch.ones(3)).tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("form", FORMATS)
def test_infinite_inputs_reach_only_what_reads_them(level, form):
    weight = torch.zeros(17, 40)
    weight[0, 3] = weight[1, 4] = weight[1, 5] = 1.0
    x = torch.zeros(1, 40)
    x[0, 20] = x[0, 0] = float("inf")
    assert not form.from_dense(weight).linear(x, None, level).any()


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_of_either_sign_are_left_out(form):
    stored = form.from_dense(torch.tensor([[0.0, -0.0, 2.0]]))
    assert stored.values.count_nonzero() == 1
    assert stored.to_dense().tolist() == [[0.0, 0.0, 2.0]]


def test_how_much_memory_they_take():
    weight = torch.zeros(256, 512)
    weight[:, ::8] = 1.0
    assert SlicedRows.from_dense(weight).nbytes == 256 * 64 * 6 + 4 * (17 + 256)
    assert BitRows.from_dense(weight).nbytes == 4 * (256 * 64 + 32) + 256 * 512 // 8 + 4 * 257
    assert RowBlocks.from_dense(weight).nbytes == 256 * 64 * 4 + 16 * 64 * 2 + 4 * 17


def changed(tensor, place, value):
    copy = tensor.clone()
    copy[place] = value
    return copy


@pytest.mark.parametrize("form", FORMATS)
def test_what_points_outside_of_the_matrix_is_refused(form):
    stored = form.from_dense(matrix(40, 50, 0.5))
    changes = [
        {"starts": changed(stored.starts, 1, int(stored.starts[2]) + 1)},
        {"starts": changed(stored.starts, 0, 1)},
        {"starts": stored.starts[:-1]},
        {"starts": changed(stored.starts, -1, int(stored.starts[-1]) + 1)},
        {"values": stored.values[:-1]},
        {"values": stored.values.double()},
        {"values": stored.values.view(1, -1)},
        {"outputs": 80},
        {"inputs": 30},
    ]
    if form is BitRows:
        changes += [{"bits": stored.bits[:-1]}, {"bits": changed(stored.bits, 1, -1)}]
    else:
        changes += [{"columns": changed(stored.columns, 0, 51)}, {"columns": changed(stored.columns, 0, -1)}]
        changes += [{"columns": stored.columns[:-1]}, {"columns": stored.columns.int()}, {"inputs": 1 << 17}]
    if form is SlicedRows:
        changes += [{"rows": changed(stored.rows, 0, 41)}, {"rows": changed(stored.rows, 0, int(stored.rows[1]))}]
    for change in changes:
        with pytest.raises(ValueError, match="found"):
            dataclasses.replace(stored, **change)


@pytest.mark.parametrize("form", FORMATS)
def test_wrong_inputs_are_refused(form):
    stored = form.from_dense(matrix(8, 20, 0.5))
    with pytest.raises(RuntimeError, match="expected 20"):
        stored.linear(torch.randn(2, 21))
    with pytest.raises(RuntimeError, match="dtype"):
        stored.linear(torch.randn(2, 20).bfloat16())
    with pytest.raises(RuntimeError, match="bias"):
        stored.linear(torch.randn(2, 20), torch.randn(7))
    with pytest.raises(RuntimeError, match="this processor has no other"):
        stored.linear(torch.randn(2, 20), None, "other")
    with pytest.raises(ValueError, match="expected a float32"):
        form.from_dense(torch.randn(3, 4).double())


def test_too_many_inputs_are_refused():
    with pytest.raises(ValueError, match="at most 65535 inputs"):
        SlicedRows.from_dense(torch.zeros(1, 1 << 16))
    with pytest.raises(ValueError, match="at most 65536 inputs"):
        RowBlocks.from_dense(torch.zeros(1, (1 << 16) + 1))


@pytest.mark.parametrize("form", FORMATS)
def test_fake_tensors_know_the_shape(form):
    from torch._subclasses.fake_tensor import FakeTensorMode

    stored = form.from_dense(matrix(8, 20, 0.5))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert stored.linear(torch.empty(2, 3, 20)).shape == (2, 3, 8)


@pytest.mark.parametrize("form", [SparseRows, *FORMATS])
def test_what_is_unpickled_is_checked(form):
    stored = form.from_dense(matrix(20, 40, 0.5))
    copied = pickle.loads(pickle.dumps(stored))
    assert torch.equal(copied.to_dense(), stored.to_dense())
    object.__setattr__(copied, "starts", copied.starts + 7)  # as a damaged file would have it
    damaged = pickle.dumps(copied)
    with pytest.raises(ValueError, match="found"):
        pickle.loads(damaged)
