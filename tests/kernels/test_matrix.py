"""Canonical matrices, and checks of their values."""

import pytest
import torch

from hf_prune.kernels import matrix
from hf_prune.kernels.matrix import is_finite


@pytest.mark.parametrize("shape", [(3, 8, 4), (1, 40), (2, 40), (1, 1, 40), (4, 4)])
def test_low_precision_is_checked_in_parts_however_large_one_of_them_is(shape, monkeypatch):
    monkeypatch.setattr(matrix, "_CHUNK", 16)  # smaller than an expert of the first shape, or a row of the others
    weight = torch.ones(shape, dtype=torch.bfloat16)
    assert is_finite(weight)
    weight.view(-1)[-1] = torch.inf
    assert not is_finite(weight)
