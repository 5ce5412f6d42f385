"""Fixtures for every test: nothing here reaches the network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests import models

# Property tests repeat themselves: the same examples in every run, and no complaint about a slow machine.
settings.register_profile("hf_prune", deadline=None, derandomize=True, print_blob=False, database=None)
settings.load_profile("hf_prune")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Each test starts from the same global seed and leaves no trace of what it drew."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=sorted(models.TRANSFORMERS))
def any_transformer(request: pytest.FixtureRequest) -> torch.nn.Module:
    """Each kind of transformer in turn."""
    return models.TRANSFORMERS[request.param]()


@pytest.fixture
def bert() -> torch.nn.Module:
    """A tiny BERT classifier."""
    return models.tiny_bert()


@pytest.fixture
def gpt2() -> torch.nn.Module:
    """A tiny GPT-2 language model."""
    return models.tiny_gpt2()
