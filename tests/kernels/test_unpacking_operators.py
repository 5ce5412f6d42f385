"""The operators that unpack weights: against numpy on odd lengths, and never outside of the arrays they are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.usefixtures("kernel")
KINDS = (np.uint8, np.uint16, np.uint32, np.uint64)


def tensor(array):
    """Of unsigned integers, of which torch lacks some, as bytes of the same size."""
    return torch.from_numpy(array.view({2: np.int16, 4: np.int32, 8: np.int64}.get(array.itemsize, np.uint8)))


def random(count, kind, seed=0):
    return np.random.default_rng(seed).integers(1, np.iinfo(kind).max, count, dtype=kind, endpoint=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotated", [False, True])
def test_planes_are_joined(level, kind, rotated):
    for count in (0, 1, 7, 33, 1000):
        values, size = random(count, kind), np.dtype(kind).itemsize
        stored = (values << kind(1)) | (values >> kind(8 * size - 1)) if rotated else values
        planes = [torch.from_numpy(stored.view(np.uint8).reshape(-1, size)[:, i].copy()) for i in range(size)]
        out = np.zeros_like(values)
        torch.ops.hf_prune.join_planes(planes, rotated, tensor(out), level)
        assert (out == values).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
def test_bits_place_values(level, kind, sparsity):
    for length in (0, 1, 7, 8, 9, 63, 64, 65, 1000, 4097):
        keep = np.random.default_rng(length).random(length) >= sparsity
        values, bits = random(int(keep.sum()), kind), np.packbits(keep)
        expected, out = np.zeros(length, kind), random(length, kind, 1)
        expected[keep] = values
        place = torch.ops.hf_prune.place_bits
        assert torch.ops.hf_prune.count_ones(tensor(bits)) == len(values)
        assert place(tensor(bits), tensor(values), tensor(out), level) == len(values)
        assert (out == expected).all()
        if len(values):  # one value too few, and a weight too few
            assert place(tensor(bits), tensor(values[:-1].copy()), tensor(out), level) == -1
            last = int(np.flatnonzero(keep)[-1])
            assert place(tensor(bits), tensor(values), tensor(out[:last]), level) == -1


@pytest.mark.parametrize("kind", KINDS)
def test_gaps_place_values(kind):
    gaps = np.array([0, 3, 255, 255, 0, 254, 0], np.uint8)
    values = random(5, kind)
    out = np.zeros(772, kind)
    place = torch.ops.hf_prune.place_gaps
    assert place(tensor(gaps), tensor(values), tensor(out)) == 772
    assert np.flatnonzero(out).tolist() == [0, 4, 515, 770, 771]
    assert (out[out != 0] == values).all()
    assert place(tensor(gaps), tensor(values), tensor(out[:771])) == -1
    assert place(tensor(gaps), tensor(values[:4].copy()), tensor(out)) == -1
    assert place(tensor(gaps), tensor(random(6, kind)), tensor(out)) == -1


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_place_values(kind):
    patterns = np.array([[0, 1], [0, 2], [1, 2]], np.uint8)
    numbers, values = np.array([2, 0, 1], np.uint8), random(5, kind)
    out = np.zeros(9, kind)
    place = torch.ops.hf_prune.place_groups
    assert place(tensor(numbers), tensor(patterns), 3, tensor(values), tensor(out))
    assert np.flatnonzero(out).tolist() == [1, 2, 3, 4, 6]
    assert (out[out != 0] == values).all()
    assert not place(tensor(numbers), tensor(patterns), 3, tensor(values), tensor(out[:6]))
    assert not place(tensor(numbers), tensor(patterns), 3, tensor(random(7, kind)), tensor(out))
    assert not place(tensor(np.array([3, 0], np.uint8)), tensor(patterns), 3, tensor(values[:4].copy()), tensor(out))


def test_wrong_arrays_are_refused():
    byte, word = tensor(np.zeros(4, np.uint8)), tensor(np.zeros(4, np.uint32))
    operators = torch.ops.hf_prune
    with pytest.raises(RuntimeError, match="there are 1 planes: expected one for each of the 4 bytes"):
        operators.join_planes([byte], False, word)
    with pytest.raises(RuntimeError, match="a plane has 3 bytes: expected 4"):
        operators.join_planes([byte] * 3 + [byte[:3]], False, word)
    with pytest.raises(RuntimeError, match="row of bytes"):
        operators.count_ones(word)
    for call in (operators.place_bits, operators.place_gaps):
        with pytest.raises(RuntimeError, match="of one size"):
            call(byte, byte, word)
    with pytest.raises(RuntimeError, match="of one size"):
        operators.place_groups(byte, byte.view(2, 2), 4, byte, word)
    with pytest.raises(RuntimeError, match="table of patterns"):
        operators.place_groups(byte, byte, 4, word, word)
