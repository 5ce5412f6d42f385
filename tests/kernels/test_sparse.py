"""The sparse kernel: every format and instruction set against products of dense matrices, on odd shapes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_prune.errors import KernelError
from hf_prune.kernels.sparse import build
from hf_prune.kernels.sparse.build import load_kernel
from hf_prune.kernels.sparse.sparse_rows import SparseRows

pytestmark = pytest.mark.usefixtures("kernel")
SHAPES = [(1, 1), (5, 17), (16, 16), (33, 100), (64, 48), (50, 1000), (3, 70_000)]
TOKENS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 100)


def matrix(outputs, inputs, sparsity, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    return weight * (torch.rand(outputs, inputs, generator=generator) >= sparsity)


def expected(x, weight, bias=None):
    product = x.double() @ weight.double().t()
    return product if bias is None else product + bias.double()


def close(found, wanted):
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
def test_products_on_odd_shapes(level, shape, sparsity):
    weight, bias = matrix(*shape, sparsity), torch.randn(shape[0])
    inputs = [torch.randn(n, shape[1]) / shape[1] ** 0.5 for n in (TOKENS if shape[1] < 2000 else (1, 5, 33))]
    products = [expected(x, weight) for x in inputs]
    for chunk in (7, 64, 1 << 16):
        rows = SparseRows.from_dense(weight, chunk)
        assert torch.equal(rows.to_dense(), weight)
        for x, product in zip(inputs, products, strict=True):
            close(rows.linear(x, bias, level), product + bias.double())
        close(rows.linear(x, None, level), product)


def test_a_thousand_tokens_on_several_threads(level):
    weight, x = matrix(130, 300, 0.8), torch.randn(1000, 300)
    rows, before = SparseRows.from_dense(weight, 96), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(rows.linear(x, None, level))
            results.append(rows.linear(x[:5], None, level))
    finally:
        torch.set_num_threads(before)
    close(results[0], expected(x, weight))
    assert torch.equal(results[0], results[2])  # the order of sums does not depend on the threads
    assert torch.equal(results[1], results[3])


def test_bfloat16_sums_in_float32(level):
    weight = matrix(40, 200, 0.7).bfloat16()
    rows = SparseRows.from_dense(weight, 64)
    bias = torch.randn(40).bfloat16()
    for tokens in (1, 4, 20, 70):
        x = torch.randn(tokens, 200).bfloat16()
        y = rows.linear(x, bias, level)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected(x, weight, bias).bfloat16(), atol=1e-2, rtol=1e-2)


def test_leading_dimensions_views_and_no_tokens():
    weight = matrix(20, 30, 0.6)
    rows = SparseRows.from_dense(weight)
    x = torch.randn(30, 5, 4).permute(1, 2, 0)  # not contiguous
    assert rows.linear(x).shape == (5, 4, 20)
    close(rows.linear(x), expected(x, weight))
    assert rows.linear(x[:0]).shape == (0, 4, 20)
    assert rows.linear(x[0, 0]).shape == (20,)
    assert SparseRows.from_dense(torch.empty(0, 30)).linear(x).shape == (5, 4, 0)


def test_infinite_inputs_reach_only_what_reads_them():
    weight = torch.zeros(2, 40)
    weight[0, 3] = 1.0
    x = torch.zeros(1, 40)
    x[0, 20] = float("inf")
    assert SparseRows.from_dense(weight).linear(x).tolist() == [[0.0, 0.0]]
    x[0, 3] = float("nan")
    assert SparseRows.from_dense(weight).linear(x).isnan().tolist() == [[True, False]]


def test_zeros_of_either_sign_are_left_out():
    rows = SparseRows.from_dense(torch.tensor([[0.0, -0.0, 2.0]]))
    assert rows.values.tolist() == [2.0]
    assert rows.to_dense().tolist() == [[0.0, 0.0, 2.0]]


def test_memory_is_six_bytes_an_entry():
    rows = SparseRows.from_dense(matrix(256, 512, 0.8), 1 << 16)
    assert rows.nbytes == 6 * len(rows.values) + 4 * 257


def test_entries_outside_of_the_matrix_are_refused():
    rows = SparseRows.from_dense(matrix(8, 20, 0.5), 16)
    wrong_column = rows.columns.clone()
    wrong_column[-1] = 4  # the last chunk has 4 inputs
    wrong_start = rows.starts.clone()
    wrong_start[3] = wrong_start[4] + 1
    for change in (
        {"columns": wrong_column},
        {"starts": wrong_start},
        {"starts": rows.starts[:-1]},
        {"values": rows.values[:-1]},
        {"chunk": 0},
        {"chunk": 1 << 17},
        {"columns": rows.columns.int()},
        {"values": rows.values.double()},
    ):
        with pytest.raises(ValueError, match="found"):
            dataclasses.replace(rows, **change)


def test_wrong_inputs_are_refused():
    rows = SparseRows.from_dense(matrix(8, 20, 0.5))
    with pytest.raises(RuntimeError, match="expected 20"):
        rows.linear(torch.randn(2, 21))
    with pytest.raises(RuntimeError, match="dtype"):
        rows.linear(torch.randn(2, 20).bfloat16())
    with pytest.raises(RuntimeError, match="bias"):
        rows.linear(torch.randn(2, 20), torch.randn(7))
    with pytest.raises(ValueError, match="expected a float32"):
        SparseRows.from_dense(torch.randn(3, 4).double())


def test_fake_tensors_know_the_shape():
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows = SparseRows.from_dense(matrix(8, 20, 0.5))
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = rows.linear(torch.empty(2, 3, 20))
    assert y.shape == (2, 3, 8)


def test_without_a_compiler_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelError, match=r"no-such-compiler was not found.*CXX"):
        load_kernel.__wrapped__()
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    source = tmp_path / "operators.cpp"
    source.write_text("#error this is not C++\n")
    monkeypatch.setattr(build, "_SOURCE", source)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    with pytest.raises(KernelError, match=r"could not be compiled.*this is not C"):
        load_kernel.__wrapped__()
    assert not (tmp_path / "cache").exists()


@pytest.mark.matrix
@pytest.mark.timeout(1800)
def test_under_sanitizers(tmp_path):
    libraries = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("the compiler has no sanitizers")
    script = (
        "from pathlib import Path\n"
        "from hf_prune.kernels.sparse import build\n"
        "build._FLAGS = ('-O0', '-std=c++20', '-Wno-psabi', '-fsanitize=address,undefined',\n"
        "                '-fno-sanitize-recover=all')\n"
        "build.load_kernel()\n"  # not within the time of a test
        "import pytest, sys\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:], '-k',\n"
        "                      'not sanitizers and not compiler and not 70000']))\n"
    )
    others = ("test_sparse_formats.py", "test_unpacking_operators.py")
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in others)]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *files], env=environment, capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


def test_a_folder_that_cannot_be_made_is_said(monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/nowhere")
    with pytest.raises(KernelError, match="TORCH_EXTENSIONS_DIR"):
        load_kernel.__wrapped__()
