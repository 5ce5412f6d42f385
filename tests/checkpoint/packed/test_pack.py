"""One weight as bytes: bit for bit back, as the specification says, and refused where it lies."""

from __future__ import annotations

import importlib.util
import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_prune.checkpoint.packed import pack as packing
from hf_prune.checkpoint.packed import unpack as unpacking
from hf_prune.checkpoint.packed import values
from hf_prune.checkpoint.packed.format import CODECS, LAYOUTS, MAGIC, MAX_EXPANSION, VALUES, read_header
from hf_prune.checkpoint.packed.pack import pack
from hf_prune.checkpoint.packed.remote_code import modeling_source
from hf_prune.checkpoint.packed.unpack import unpack, unpack_mask
from hf_prune.errors import CheckpointError
from hf_prune.kernels.sparse.build import kernel_problem
from tests.models import same_bits
from tests.reference import packing as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((0,), (0, 5), (3, 0), (), (1,), (7,), (4, 8), (2, 3, 5), (3, 300))
HEAD = "<4s10BxxQ"


@pytest.fixture(scope="module", autouse=True, params=["numpy", "compiled"])
def way(request):
    """Everything is unpacked both ways."""
    if request.param == "compiled" and (problem := kernel_problem()) is not None:
        pytest.skip(problem)
    with pytest.MonkeyPatch.context() as patch:
        for module in (unpacking, values):
            patch.setattr(module, "has_operators", lambda: request.param == "compiled")
        yield request.param


def weight(shape: tuple[int, ...], sparsity: float, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random values with zeros, -0.0, infinities and NaN among those that stay, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    flat = values.view(-1)
    for value in (0.0, -0.0, math.inf, math.nan):
        flat[torch.rand(flat.shape, generator=generator) < 0.05] = value
    mask = torch.rand(shape, generator=generator) >= sparsity
    return values.to(dtype).masked_fill(~mask, 0), mask


def nm_weight(n: int, m: int, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand((shape[0] * shape[1] // m, m), generator=generator)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(n, 1).indices, True).view(shape)
    return torch.randn(shape, generator=generator).to(dtype).masked_fill(~mask, 0), mask


def assert_reads_back(data: np.ndarray, tensor: Tensor, mask: Tensor | None) -> None:
    """By the code, and by somebody who knows the specification alone."""
    assert same_bits(unpack(data), tensor)
    found, keep, masked = reference.read(data.tobytes())
    assert same_bits(found, tensor)
    assert masked == (mask is not None)
    assert keep == unpack_mask(data).reshape(-1).tolist()
    if mask is not None:
        assert torch.equal(unpack_mask(data), mask)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.04, 0.5, 0.95, 1.0])
def test_bit_for_bit(codec, dtype, sparsity):
    for shape in SHAPES:
        tensor, mask = weight(shape, sparsity, dtype)
        assert_reads_back(pack(tensor, mask, codec=codec), tensor, mask)
        assert_reads_back(pack(tensor, codec=codec), tensor, None)


@given(
    shape=st.lists(st.integers(0, 20), max_size=3).map(tuple),
    sparsity=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    codec=st.sampled_from(CODECS),
    seed=st.integers(0, 1000),
)
def test_any_weight_comes_back(shape, sparsity, dtype, codec, seed):
    tensor, mask = weight(shape, sparsity, dtype, seed)
    assert_reads_back(pack(tensor, mask, codec=codec), tensor, mask)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_piece_by_piece(monkeypatch, codec, dtype):
    """Large weights are read some at a time: here all are, in pieces so small that each layout has many of them."""
    monkeypatch.setattr(unpacking, "CHUNK", 64)
    monkeypatch.setattr(values, "CHUNK", 64)
    monkeypatch.setattr(values, "_AT_ONCE", 0)
    for sparsity in (0.0, 0.04, 0.5, 0.95, 1.0):
        tensor, mask = weight((3, 701), sparsity, dtype)
        assert_reads_back(pack(tensor, mask, codec=codec), tensor, mask)
        assert_reads_back(pack(tensor.abs().clamp(1, 3), codec=codec), tensor.abs().clamp(1, 3), None)  # in pairs
        nonzero = torch.where(mask, tensor.sign().where(tensor.isfinite() & (tensor != 0), 1.0), 0)
        assert_reads_back(pack(nonzero, mask, codec=codec), nonzero, mask)
    for n, m in ((1, 2), (2, 4), (2, 8), (15, 16)):
        tensor, mask = nm_weight(n, m, (7, 80), dtype)
        assert_reads_back(pack(tensor, mask, codec=codec), tensor, mask)
    tensor, mask = nm_weight(2, 4, (7, 80), dtype)
    assert same_bits(
        unpack(pack(tensor, mask, codec=codec, values="int8")),
        reference.read(pack(tensor, mask, codec=codec, values="int8").tobytes())[0],
    )


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_while_it_is_unpacked(monkeypatch, stored, dtype):
    monkeypatch.setattr(unpacking, "CHUNK", 64)
    monkeypatch.setattr(values, "CHUNK", 64)
    cases = [(weight((3, 701), sparsity, stored), "exact") for sparsity in (0.0, 0.5, 0.95)]
    cases += [(nm_weight(2, 4, (7, 80), stored), kind) for kind in VALUES]
    for (tensor, mask), kind in cases:
        for form in (tensor, tensor.t().contiguous()):
            data = pack(form, mask if form is tensor else mask.t().contiguous(), values=kind)
            found, expected = unpack(data, dtype=dtype), unpack(data).to(dtype)
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(found.signbit() & ~found.isnan(), expected.signbit() & ~expected.isnan())


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (2, 16)])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("columns", [False, True])
def test_patterns_are_numbers(n, m, codec, columns):
    tensor, mask = nm_weight(n, m, (6, 48))
    if columns:  # as Conv1D has them
        tensor, mask = tensor.t().contiguous(), mask.t().contiguous()
    data = pack(tensor, mask, codec=codec)
    header = read_header(data)
    assert header.layout == "groups"
    assert math.comb(*reversed(header.group)) <= math.comb(m, n)  # 4:8 and finer patterns are 2:4 now and then
    assert header.transposed == columns
    assert_reads_back(data, tensor, mask)


def test_two_of_four_take_eight_bits_for_twelve_weights():
    tensor, mask = nm_weight(2, 4, (8, 120))
    first, last = read_header(pack(tensor, mask, codec="none")).sections[0]
    assert last - first == 8 * 120 // 12


def test_long_gaps_are_escaped():
    tensor = torch.zeros(3000, dtype=torch.bfloat16)
    tensor[[0, 255, 511, 767, 2999]] = 1.0  # gaps of 0, 254, 255, 255 and 2231 zeros
    data = pack(tensor, codec="none")
    header = read_header(data)
    assert header.layout == "gaps"
    start, end = header.sections[0]
    assert data[start:end].tolist() == [0, 254, 255, 0, 255, 0, *[255] * 8, 191]
    assert_reads_back(data, tensor, None)


@pytest.mark.parametrize("kept", [32, 63, 64, 65, 4000, 4001])
def test_a_plane_of_few_bytes_is_written_two_to_a_byte(kept):
    """Random among 1.0 and 2.0, signs known: less than a bit each, which is what one code for each takes at least."""
    tensor = torch.zeros(5000, dtype=torch.bfloat16)
    drawn = torch.rand(kept, generator=torch.Generator().manual_seed(0)) < 0.11
    tensor[:kept] = torch.where(drawn, 2.0, 1.0)
    data = pack(tensor)
    assert_reads_back(data, tensor, None)
    if kept >= 4000:
        start, end = read_header(data).sections[2]  # the highest byte: 0x3f or 0x40
        assert end - start < kept / 8


def test_kept_zeros_and_minus_zero():
    tensor = torch.tensor([0.0, -0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    mask = torch.tensor([True, True, True, False, False, False, False, False])
    data = pack(tensor, mask)
    assert read_header(data).kept == 3
    assert_reads_back(data, tensor, mask)
    assert read_header(pack(tensor)).kept == 2  # without a mask, only what has no bit set is left out


def test_what_the_mask_removes_has_to_be_zero():
    tensor, mask = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    for value in (2.0, -0.0, math.nan):
        tensor[1] = value
        with pytest.raises(CheckpointError, match=r"removes weights that are not \+0.0: call apply_masks"):
            pack(tensor, mask)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_int8_is_within_half_a_step_of_each_row(dtype, codec):
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand((16, 200), generator=generator) > 0.7
    mask[3] = False
    tensor = torch.randn((16, 200), generator=generator).mul(torch.arange(16.0).unsqueeze(1)).to(dtype)
    tensor = tensor.masked_fill(~mask, 0)
    data = pack(tensor, mask, codec=codec, values="int8")
    assert read_header(data).lossy
    found = unpack(data)
    assert found.dtype == dtype
    assert torch.equal(unpack_mask(data), mask)
    step = tensor.float().abs().amax(1, keepdim=True) / 127
    rounding = torch.finfo(dtype).eps * tensor.float().abs()
    assert bool(((found.float() - tensor.float()).abs() <= 0.5001 * step + rounding).all())
    assert same_bits(found, reference.read(data.tobytes())[0])
    assert len(data) < len(pack(tensor, mask, codec=codec))


def test_int8_of_columns_scales_each_output():
    tensor, mask = nm_weight(2, 4, (6, 48), torch.float32)
    tensor = (tensor * 10.0 ** torch.arange(6).unsqueeze(1)).t().contiguous()
    data = pack(tensor, mask.t().contiguous(), values="int8")
    assert read_header(data).transposed
    assert float(((unpack(data) - tensor).abs() / tensor.abs().amax(0)).max()) < 0.51 / 127
    assert same_bits(unpack(data), reference.read(data.tobytes())[0].contiguous())


def test_int8_needs_finite_values_and_leaves_dense_weights_alone():
    tensor = torch.zeros(4, 40)
    tensor[0, 0] = math.inf
    with pytest.raises(CheckpointError, match="not finite, which int8 cannot hold: use values='exact'"):
        pack(tensor, values="int8")
    dense = torch.randn(4, 40)
    assert not read_header(pack(dense, values="int8")).lossy


# --- sizes -----------------------------------------------------------------------------------------


def gaussian(sparsity: float, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    values = torch.randn((512, 1024), generator=torch.Generator().manual_seed(0)) * 0.04
    mask = values.abs() > values.abs().flatten().kthvalue(int(sparsity * values.numel())).values
    return values.to(dtype).masked_fill(~mask, 0), mask


@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.76), (0.8, 0.32), (0.9, 0.17), (0.95, 0.09)])
def test_bytes_of_a_bfloat16_weight(sparsity, most):
    tensor, mask = gaussian(sparsity)
    assert len(pack(tensor, mask)) / tensor.numel() <= most


def test_bytes_of_a_dense_bfloat16_weight():
    tensor = torch.randn((512, 1024), generator=torch.Generator().manual_seed(0)).bfloat16()
    assert len(pack(tensor)) <= 0.75 * tensor.nbytes


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_without_a_codec_a_bit_each_and_the_values_as_they_are(sparsity, dtype):
    tensor, mask = gaussian(sparsity, dtype)
    data = pack(tensor, mask, codec="none")
    start, end = read_header(data).sections[1]
    stored = torch.from_numpy(data[start:end].copy()).view(dtype)
    assert same_bits(stored, tensor[mask])
    assert len(data) <= 1.03 * (tensor.numel() / 8 + stored.nbytes)


def test_nothing_stands_for_more_than_its_length_allows():
    data = pack(torch.zeros(1 << 22))
    assert len(data) == (1 << 24) // MAX_EXPANSION
    assert_reads_back(pack(torch.zeros(100_000)), torch.zeros(100_000), None)


PEAK = """
import sys, torch
from hf_prune.checkpoint.packed.pack import pack
from hf_prune.checkpoint.packed.unpack import unpack
from hf_prune.kernels.sparse.build import load_if_compiled
kind, values, way = sys.argv[1:]
if way == "compiled":
    load_if_compiled()
mask = torch.zeros((1 << 21, 4), dtype=torch.bool)
mask[:, ::2] = True
tensor = mask.bfloat16()
if kind == "columns":
    tensor, mask = tensor.t().contiguous(), mask.t().contiguous()
elif kind == "one column":
    mask = torch.rand((1 << 23, 1)) > 0.999
    tensor = mask.bfloat16()
data = pack(tensor, mask, values=values)
unpack(pack(tensor[:4096], mask[:4096], values=values))  # imports

def memory(what):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(what))

open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = memory("VmRSS")
found = unpack(data)
print(memory("VmHWM") - before, found.nbytes)
assert torch.equal(found, tensor)
"""


@pytest.mark.covering(1)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("kind", ["rows", "columns", "one column"])
def test_unpacking_takes_the_dense_weight_and_no_more(kind, values, way):
    """Neither for int8, nor to transpose, nor for scales that take twice the memory of the weight."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back
    words = [sys.executable, "-c", PEAK, kind, values, way]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    peak, dense = map(int, done.stdout.split())
    assert dense == 1 << 24
    assert 0.8 * dense < peak < dense + (6 << 20)  # pieces


# --- damage ----------------------------------------------------------------------------------------


def head(data: np.ndarray, at: int, value: int, form: str = "B") -> np.ndarray:
    changed = bytearray(data.tobytes())
    struct.pack_into(f"<{form}", changed, at, value)
    return np.frombuffer(bytes(changed), dtype=np.uint8)


SIZES = "gaps bits groups full".split()


def packed(layout: str, codec: str = "zstd") -> np.ndarray:
    tensor, mask = {
        "gaps": lambda: weight((40, 50), 0.95, torch.float32),
        "bits": lambda: weight((40, 50), 0.5, torch.float32),
        "groups": lambda: nm_weight(2, 4, (40, 60)),
        "full": lambda: weight((40, 50), 0.0, torch.float32),
    }[layout]()
    data = pack(tensor, mask, codec=codec)
    assert read_header(data).layout in (layout, "gaps")
    return data


@pytest.mark.parametrize("layout", SIZES)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("at", "value", "form", "message"),
    [
        (0, 0, "B", "it begins with"),
        (4, 2, "B", "its header is not valid"),
        (5, 9, "B", "its header is not valid"),
        (6, 4, "B", "its header is not valid"),
        (7, 7, "B", "its header is not valid"),
        (8, 3, "B", "flags other than 0 and 1"),
        (13, 200, "B", "it has 200 dimensions, expected at most 8"),
        (16, 1 << 60, "Q", "values, layout"),
        (24, 1 << 40, "Q", "claim to be a weight of shape"),
        (32, (1 << 64) - 1, "Q", "claim to be a weight of shape"),
        (40, 1 << 62, "Q", "its sections end at byte"),
        (48, (1 << 64) - 1, "Q", "its sections end at byte"),
    ],
)
def test_headers_that_lie_are_refused(layout, codec, at, value, form, message):
    with pytest.raises(CheckpointError, match=message):
        read_header(head(packed(layout, codec), at, value, form))


@pytest.mark.parametrize("layout", SIZES)
@pytest.mark.parametrize("codec", CODECS)
def test_counts_that_lie_are_refused(layout, codec):
    data = packed(layout, codec)
    kept = read_header(data).kept
    for wrong in (kept - 1, kept + 1, 0):
        with pytest.raises(CheckpointError, match="is damaged"):
            unpack(head(data, 16, wrong, "Q"))
    with pytest.raises(CheckpointError, match="is damaged"):
        unpack(head(data, 24, 10, "Q"))


def empty_weight(shape: tuple[int, ...], values: str, scales: int = 0) -> np.ndarray:
    """A weight without elements that claims int8 scales, all zeros, for its rows."""
    frame = zstandard.ZstdCompressor().compress
    sections = [frame(b""), frame(bytes(scales)), frame(b"")] if values == "int8" else [b"", *[frame(b"")] * 4]
    layout = LAYOUTS.index("bits" if values == "int8" else "full")
    text = struct.pack(HEAD, MAGIC, CODECS.index("zstd"), 0, layout, VALUES.index(values), 0, 0, 0, 0, 0, len(shape), 0)
    text += struct.pack(f"<{len(shape) + len(sections)}Q", *shape, *map(len, sections))
    return np.frombuffer(b"".join(part + bytes(-len(part) % 8) for part in [text, *sections]), dtype=np.uint8)


@pytest.mark.parametrize("rows", [1025, 1 << 20])
@pytest.mark.parametrize("padding", [0, 1 << 20])
def test_scales_of_rows_without_elements_are_bounded(rows, padding):
    """However long the file is: there is nothing that they could scale."""
    data = np.concatenate([empty_weight((rows, 0), "int8", 4 * rows), np.zeros(padding, dtype=np.uint8)])
    with pytest.raises(CheckpointError, match=rf"{len(data)} bytes claim .* \[{rows}, 0\], sections of {4 * rows} b"):
        unpack(data)
    assert unpack(empty_weight((2, 0), "int8", 8)).shape == (2, 0)


@pytest.mark.parametrize("shape", [(4000, 1), (4000,), (1, 4000), (1000, 2, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", VALUES)
def test_what_is_packed_is_never_refused_for_its_sections(shape, dtype, values):
    """A scale for each row is more than a weight of one column in half precision."""
    mask = torch.arange(4000).reshape(shape) % 10 > 0
    data = pack(mask.to(dtype), mask, values=values)
    assert read_header(data).values == values
    assert torch.equal(unpack(data), mask.to(dtype))


def test_the_reader_that_travels_with_checkpoints_refuses_the_same(tmp_path):
    path = tmp_path / "modeling.py"
    path.write_text(modeling_source([]), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("modeling_of_a_checkpoint", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    data = np.concatenate([empty_weight((1 << 20, 0), "int8", 4 << 20), np.zeros(1 << 20, dtype=np.uint8)])
    with pytest.raises(module.CheckpointError, match=r"\[1048576, 0\], sections of 4194304 bytes"):
        module.unpack(data)


@pytest.mark.parametrize("shape", [(1 << 63, 0), (0, 1 << 63), (1 << 40, 1 << 40, 0), ((1 << 64) - 1, 0)])
def test_shapes_that_torch_cannot_hold_are_refused(shape):
    with pytest.raises(CheckpointError, match="claim to be a weight of shape"):
        unpack(empty_weight(shape, "exact"))
    assert unpack(empty_weight((1 << 62, 0), "exact")).shape == (1 << 62, 0)


@pytest.mark.parametrize("layout", SIZES)
def test_a_frame_that_would_become_larger_is_not_unpacked(layout):
    """A few bytes of zstd can stand for gigabytes: their number is compared before memory is taken for them."""
    data = packed(layout)
    header = read_header(data)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    start, _ = header.sections[1]
    changed = bytearray(data.tobytes()[:start] + bomb)
    struct.pack_into("<Q", changed, 24 + 16 + 8, len(bomb))
    changed += bytes(1 << 16)
    with pytest.raises(CheckpointError, match=f"section 1 claims to hold {1 << 28} bytes"):
        unpack(np.frombuffer(bytes(changed), dtype=np.uint8))


@pytest.mark.parametrize("at_once", [0, 1 << 20])
@pytest.mark.parametrize("layout", SIZES)
def test_a_frame_that_breaks_off_is_refused(monkeypatch, layout, at_once):
    monkeypatch.setattr(values, "_AT_ONCE", at_once)
    data = packed(layout)
    *before, (start, end) = read_header(data).sections
    with pytest.raises(CheckpointError, match=r"is damaged: .*ends early"):
        unpack(head(data, 24 + 16 + 8 * len(before), end - start - 5, "Q"))


def test_a_frame_that_would_keep_much_in_memory_is_refused(monkeypatch):
    """A few bytes can ask for a window of gigabytes, beside the weight; what we write needs half a megabyte."""
    tensor = torch.ones((5000, 4000), dtype=torch.bfloat16)
    assert same_bits(unpack(pack(tensor)), tensor)
    wide = zstandard.ZstdCompressionParameters(window_log=27, compression_level=1)
    monkeypatch.setattr(packing, "_SETTINGS", [wide])
    with pytest.raises(CheckpointError, match=r"is damaged: .*too much memory"):
        unpack(pack(tensor))


def test_unused_bytes_of_patterns_are_refused():
    tensor, mask = nm_weight(2, 4, (8, 120))
    data = pack(tensor, mask, codec="none").copy()
    data[read_header(data).sections[0][0]] = 216
    with pytest.raises(CheckpointError, match="a byte is 216, expected less than 216"):
        unpack(data)
