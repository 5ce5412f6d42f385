"""The examples in the ADDING.md guides are code that works: one class or one call is all that an addition takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertGenerationConfig, BertGenerationEncoder

import hf_prune
from hf_prune.architectures import base
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.architectures.kinds.registry import KINDS
from hf_prune.criteria.registry import CRITERIA
from hf_prune.granularities.registry import GRANULARITIES
from tests.architecture_models import tiny

ROOT = Path(hf_prune.__file__).parent


@pytest.fixture
def added() -> Iterator[None]:
    """Take away what a test registers."""
    registries = (CRITERIA, GRANULARITIES, KINDS)
    for registry in registries:
        registry.names()
    hf_prune.list_architectures()
    entries, table = [dict(registry._entries) for registry in registries], dict(base._TABLE)
    yield
    for registry, before in zip(registries, entries, strict=True):
        registry._entries = before
    base._TABLE.clear()
    base._TABLE.update(table)


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


@pytest.mark.usefixtures("added")
def test_architecture_guide() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
    model = BertGenerationEncoder(BertGenerationConfig(vocab_size=50, **sizes))
    found = find_unit_groups(model)
    assert all(group.is_found for group in found)
    run_example("architectures")
    assert [replace(group, origin="from the table", counts=(), values=(), minimum=0) for group in found] == [
        replace(group, counts=(), values=(), minimum=0) for group in find_unit_groups(model)
    ]
    hf_prune.shrink(hf_prune.prune(model, 0.5, granularity=("head", "neuron"), criterion="magnitude"))
    layer = model.encoder.layer[1]
    assert layer.attention.self.query.out_features == 16
    assert layer.intermediate.dense.out_features == 12
    assert model(torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all()


@pytest.mark.usefixtures("added")
def test_kind_guide() -> None:
    run_example("architectures/kinds")
    model, inputs = tiny("bert")
    hf_prune.prune(model, 0.5, granularity="pooled", criterion="magnitude")
    masked = model(**inputs()).logits
    hf_prune.shrink(model)
    assert model.classifier.in_features == model.bert.pooler.dense.out_features == 16
    assert torch.allclose(model(**inputs()).logits, masked, atol=1e-5)
