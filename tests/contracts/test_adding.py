"""The examples in the ADDING.md guides are code that works: one decorated class is all that an addition takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hf_prune
from hf_prune.criteria.registry import CRITERIA
from hf_prune.granularities.registry import GRANULARITIES

ROOT = Path(hf_prune.__file__).parent


@pytest.fixture
def added() -> Iterator[None]:
    """Take away what a test registers."""
    CRITERIA.names()
    GRANULARITIES.names()
    before = dict(CRITERIA._entries), dict(GRANULARITIES._entries)
    yield
    CRITERIA._entries, GRANULARITIES._entries = before


def run_example(guide: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / guide / "ADDING.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, f"{guide}/ADDING.md", "exec"), {"__name__": f"example_{guide}"})


@pytest.mark.usefixtures("added")
def test_criterion_guide() -> None:
    run_example("criteria")
    model = torch.nn.Linear(4, 2, bias=False)
    model.weight.data = torch.tensor([[10.0, 20, 30, 40], [1, 2, 3, -4]])
    hf_prune.prune(model, 0.5, criterion="relative")
    assert model.weight.tolist() == [[0, 0, 30, 40], [0, 0, 3, -4]]


@pytest.mark.usefixtures("added")
def test_granularity_guide() -> None:
    run_example("granularities")
    model = torch.nn.Linear(2, 4, bias=False)
    model.weight.data = torch.tensor([[1.0, 9], [5, 1], [3, 1], [4, 1]])
    hf_prune.prune(model, 0.5, granularity="tall:2")
    assert model.weight.tolist() == [[0, 9], [0, 1], [3, 0], [4, 0]]
    with pytest.raises(hf_prune.UnknownNameError, match=re.escape("tall:R (such as tall:16)")):
        hf_prune.PruningConfig(granularity="tall:0")
