"""What tests of compiled operators share: they skip where nothing compiles, or the processor lacks a level."""

from __future__ import annotations

import pytest
import torch

from hf_prune.kernels.sparse.build import kernel_problem

LEVELS = ("portable", "avx2", "avx512")


@pytest.fixture(scope="module")
def kernel():
    if (problem := kernel_problem()) is not None:
        pytest.skip(problem)


@pytest.fixture(params=LEVELS)
def level(request, kernel):
    known = torch.ops.hf_prune.sparse_level()
    if LEVELS.index(request.param) > LEVELS.index(known):
        pytest.skip(f"this processor has {known}")
    return request.param
