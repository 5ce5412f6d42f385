"""What is zero in a model, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from hf_prune import PruningConfig, prunable, prune, shrink, sparsity_report, structure_report, weight_histogram
from hf_prune.errors import PlanError
from hf_prune.evaluation.weight_statistics import WeightStatistics
from tests import models


class Hand(nn.Module):
    """Numbers to count by hand: 8 + 2 + 6 + 3 = 19 parameters, 14 of them in Linear weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 2)
        self.b = nn.Linear(2, 3)
        self.norm = nn.LayerNorm(1, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[1.0, -2, 0, 0], [0, 3, 0, 0]]))
            self.a.bias.copy_(torch.tensor([0.0, 5]))
            self.b.weight.copy_(torch.tensor([[1.0, 2], [3, 4], [5, 0]]))
            self.b.bias.copy_(torch.tensor([0.0, 0, 0]))


@pytest.fixture
def report():
    return sparsity_report(Hand())


def test_every_total(report):
    assert report.model_name == "Hand"
    assert report.parameters == 8 + 2 + 6 + 3 + 1
    assert report.nonzero == 3 + 1 + 5 + 0 + 1
    assert report.target_parameters == 14
    assert report.removed == 5 + 1
    assert report.remaining == 20 - 6
    assert report.target_sparsity == 6 / 14
    assert report.model_sparsity == 6 / 20
    assert report.bytes == 80


def test_every_tensor(report):
    assert [t.name for t in report.tensors] == ["a.weight", "a.bias", "b.weight", "b.bias", "norm.weight"]
    assert [t.is_target for t in report.tensors] == [True, False, True, False, False]
    assert [t.shape for t in report.tensors] == [(2, 4), (2,), (3, 2), (3,), (1,)]
    assert [t.parameters for t in report.tensors] == [8, 2, 6, 3, 1]
    assert [t.nonzero for t in report.tensors] == [3, 1, 5, 0, 1]
    assert [t.sparsity for t in report.tensors] == [5 / 8, 1 / 2, pytest.approx(1 / 6), 1, 0]
    assert [t.bytes for t in report.tensors] == [32, 8, 24, 12, 4]
    assert [t.nm_patterns for t in report.tensors] == [("2:4",), (), (), (), ()]
    assert report.nm_patterns == ()
    assert [t.name for t in report.targets] == ["a.weight", "b.weight"]


def test_statistics(report):
    a = report.tensors[0].after
    assert (a.min, a.max, a.mean) == (-2, 3, 2 / 8)
    assert a.std == pytest.approx((14 / 8 - (2 / 8) ** 2) ** 0.5)
    assert report.tensors[1].after is None
    assert report.tensors[0].before is None


def test_statistics_of_low_precision_are_accumulated_in_float64():
    values = torch.full((4096,), 0.1, dtype=torch.bfloat16)
    values[0] = 100
    found = WeightStatistics.of(values)
    assert found.mean == pytest.approx(float(values.double().mean()), rel=1e-12)
    assert found.std == pytest.approx(float(values.double().std(correction=0)), rel=1e-12)


def test_text(report):
    assert str(report).splitlines() == [
        "Sparsity of Hand",
        "weight    shape  weights  non-zero  sparsity  N:M  bytes",
        "--------  -----  -------  --------  --------  ---  -----",
        "a.weight  2x4          8         3   62.50 %  2:4     32",
        "b.weight  3x2          6         5   16.67 %    -     24",
        "",
        "values, zeros included      min     max    mean     std",
        "----------------------  -------  ------  ------  ------",
        "a.weight                -2.0000  3.0000  0.2500  1.2990",
        "b.weight                 0.0000  5.0000  2.5000  1.7078",
        "",
        "Targets: 6 of 14 weights are zero (42.86 %). Whole model: 14 of 20 parameters remain (30.00 % removed).",
        "4 more are zero in tensors that pruning does not cover.",
        "Size: 80 B dense; zeros are stored like any other number.",
    ]


def test_dict_and_json_agree_and_hold_everything(report):
    values = json.loads(report.to_json())
    assert values == json.loads(json.dumps(report.to_dict()))
    tensors = values.pop("tensors")
    assert values == {
        "format_version": 1,
        "model": "Hand",
        "parameters": 20,
        "nonzero": 10,
        "remaining": 14,
        "target_parameters": 14,
        "removed": 6,
        "target_sparsity": 6 / 14,
        "model_sparsity": 0.3,
        "nm_patterns": [],
        "bytes": 80,
        "file_bytes": None,
        "polish": "",
        "notes": [],
        "structure": None,
    }
    assert [t["name"] for t in tensors] == [t.name for t in report.tensors]
    assert tensors[0] == {
        "name": "a.weight",
        "shape": [2, 4],
        "is_target": True,
        "parameters": 8,
        "nonzero": 3,
        "nm_patterns": ["2:4"],
        "bytes": 32,
        "after": {"min": -2.0, "max": 3.0, "mean": 0.25, "std": report.tensors[0].after.std},
        "before": None,
        "sparsity": 0.625,
    }


def test_reference_numbers_after_pruning():
    """A weight bias stays, only weights go; 0.5 of every Linear weight."""
    model = prunable(models.tiny_bert())
    total = sum(p.numel() for p in model.parameters())
    targets = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    report = model.prune(0.5).sparsity_report()
    assert (report.parameters, report.target_parameters, report.removed) == (total, targets, targets // 2)
    assert report.remaining == report.nonzero == total - targets // 2
    assert "more are zero" not in str(report)


def test_before_and_after():
    model = models.mlp()
    dense = sparsity_report(model)
    pruned = sparsity_report(prune(model, 0.5)).with_before(dense)
    assert [t.before for t in pruned.tensors] == [t.after for t in dense.tensors]
    assert all(t.after.std != t.before.std for t in pruned.targets)
    assert "std before" in str(pruned)
    assert f"{dense.targets[0].after.std:.4f}" in str(pruned)
    assert "std before" not in str(dense)
    assert json.loads(pruned.to_json())["tensors"][0]["before"]["std"] == dense.targets[0].after.std


def test_before_is_known_where_dense_weights_were_kept():
    model = models.mlp()
    dense = sparsity_report(model)
    pruned = sparsity_report(prune(model, 0.5, keep_dense=True))
    assert [t.before for t in pruned.targets] == [t.after for t in dense.targets]


def test_before_of_another_model_stays_empty():
    report = sparsity_report(models.mlp()).with_before(sparsity_report(models.conv_net()))
    assert {t.before for t in report.tensors} == {None}
    assert "std before" not in str(report)


def test_tied_weights_count_once():
    model = models.tiny_gpt2()
    report = sparsity_report(model)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    names = [t.name for t in report.tensors]
    assert len(names) == len(set(names))
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    tied = sparsity_report(models.tied_linears())
    assert tied.parameters == 64 + 8 + 8 + 16 + 2
    assert [t.name for t in tied.targets] == ["first.weight", "head.weight"]


def test_targets_follow_masks_then_the_config():
    model = models.tiny_bert()
    prune(model, 0.5, target_modules=["query"])
    assert {t.name.rsplit(".", 2)[-2] for t in sparsity_report(model).targets} == {"query"}
    by_config = sparsity_report(model, PruningConfig(target_modules=["key"]))
    assert {t.name.rsplit(".", 2)[-2] for t in by_config.targets} == {"key"}
    assert by_config.removed == 0
    assert "zero in tensors that pruning does not cover" in str(by_config)


def test_masks_of_a_bare_module():
    """Its one module has the empty name."""
    report = sparsity_report(prune(nn.Linear(4, 2), 0.5))
    assert (report.removed, report.target_parameters) == (4, 8)


def test_convolutions_with_masks_are_targets():
    model = prune(models.conv_net(), 0.5, target_modules=["conv2d"])
    assert [t.name for t in sparsity_report(model).targets] == ["conv2d.weight"]


def test_model_without_targets():
    report = sparsity_report(nn.LayerNorm(4))
    assert report.targets == ()
    assert (report.parameters, report.removed, report.target_sparsity, report.model_sparsity) == (8, 0, 0.0, 0.0)
    assert report.nm_patterns == ()
    assert "Targets: 0 of 0 weights are zero (0.00 %)." in str(report)
    assert "N:M:" not in str(report)
    empty = sparsity_report(nn.ReLU())
    assert (empty.parameters, empty.model_sparsity, empty.bytes) == (0, 0.0, 0)


def test_config_that_does_not_match_is_an_error():
    with pytest.raises(PlanError, match="unknown module 'query'"):
        sparsity_report(models.mlp(), PruningConfig(target_modules=["query"]))


def test_report_does_not_change_the_model():
    model = prune(models.tiny_gpt2(), 0.5)
    before = models.snapshot(model)
    sparsity_report(model)
    weight_histogram(model, ["transformer.h.0.mlp.c_fc.weight"])
    models.assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_bytes_follow_the_dtype(dtype):
    report = sparsity_report(Hand().to(dtype))
    assert report.bytes == 20 * torch.finfo(dtype).bits // 8
    assert report.removed == 6


# --- N:M -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:4", "2:8", "4:8", "8:16"])
def test_pruned_to_a_pattern_satisfies_it(pattern):
    model = prune(models.tiny_bert(), granularity=pattern)
    report = sparsity_report(model)
    assert report.nm_patterns[0] == pattern
    assert f"N:M: every target satisfies {', '.join(report.nm_patterns)}." in str(report)
    weight = model.get_parameter(report.targets[0].name)
    with torch.no_grad():
        weight[0] = 1
    with pytest.warns(UserWarning, match="are not zero any more"):
        assert pattern not in sparsity_report(model).nm_patterns


def brute_force_patterns(matrix: torch.Tensor, n: int = 2, m: int = 4) -> tuple[str, ...]:
    rows = [row[i : i + m] for row in (matrix != 0).tolist() for i in range(0, len(row), m)]
    fits = matrix.shape[1] % m == 0 and all(sum(row) <= n for row in rows)
    return (f"{n}:{m}",) if fits and sum(map(sum, rows)) >= matrix.numel() * n / m / 2 else ()


def test_patterns_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for columns in (4, 6, 8, 12):
        for density in (0.05, 0.2, 0.4, 0.5, 1) * 4:
            layer = nn.Linear(columns, 2)
            with torch.no_grad():
                layer.weight.copy_(torch.rand(2, columns, generator=generator) < density)
            found = sparsity_report(layer).tensors[0].nm_patterns
            assert found == brute_force_patterns(layer.weight)
            seen.add(found)
    assert len(seen) == 2


def test_patterns_that_sparse_weights_satisfy_by_accident_are_not_named():
    """At 95 % few runs of 16 have more than 8 weights, and of this matrix none has; nobody made it so."""
    torch.manual_seed(0)
    model = prune(nn.Linear(64, 8), 0.95)
    kept = (model.weight != 0).reshape(-1, 4).sum(1)
    assert kept.max() <= 2
    report = sparsity_report(model)
    assert report.nm_patterns == report.targets[0].nm_patterns == ()
    assert "N:M:" not in str(report)


def test_a_pattern_that_hardware_knows_is_named_whoever_made_it():
    model = nn.Linear(8, 2)
    with torch.no_grad():
        model.weight[:, ::2] = 0
    assert sparsity_report(model).nm_patterns == ("2:4",)
    assert sparsity_report(prune(nn.Linear(8, 2), granularity="1:4")).nm_patterns == ("1:4", "2:4")


def test_patterns_run_along_the_inputs_of_conv1d():
    model = prune(models.tiny_gpt2(), granularity="2:4", target_modules=["c_fc"])
    target = sparsity_report(model).targets[0]
    assert target.shape == (16, 64)
    assert "2:4" in target.nm_patterns
    weight = model.get_parameter(target.name)
    assert brute_force_patterns(weight.t())[:1] == target.nm_patterns[:1]


# --- histogram -------------------------------------------------------------------------------------


def test_histogram_by_hand():
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0.1, -0.1, 5], [0, 0, -1, 0.9]]))
    found = weight_histogram(layer, ["weight"], bins=5, limit=1.0)
    assert found.edges.tolist() == pytest.approx([-1, -0.6, -0.2, 0.2, 0.6, 1])
    assert found.counts.tolist() == [1, 0, 2, 0, 2]  # 5 lies beyond the edges, in the outer bin
    assert found.zeros == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [None, 0.01, 0.1, 1 / 3, 1.0])
def test_every_weight_is_counted(dtype, limit):
    """Also those at the edges, where rounding to float32 must not push them out."""
    model = prune(models.tiny_bert().to(dtype), 0.5)
    report = sparsity_report(model)
    names = [t.name for t in report.targets]
    found = weight_histogram(model, names, limit=limit)
    assert found.zeros == report.removed
    assert found.counts.sum() + found.zeros == report.target_parameters
    assert found.edges[0] == -found.edges[-1]
    assert len(found.counts) == len(found.edges) - 1 == 81


def test_before_and_after_share_their_edges():
    model = models.mlp()
    names = ["fc1.weight", "fc2.weight"]
    before = weight_histogram(model, names)
    assert before.edges[-1] == pytest.approx(
        4 * max(float(model.get_parameter(n).detach().std(correction=0)) for n in names)
    )
    after = weight_histogram(prune(model, 0.5), names, limit=float(before.edges[-1]))
    assert np.array_equal(before.edges, after.edges)
    assert before.zeros == 0
    assert (after.counts <= before.counts).all()
    assert (
        after.zeros
        == before.counts.sum() - after.counts.sum()
        == sum(model.get_parameter(n).numel() // 2 for n in names)
    )


def test_histogram_of_zeros_and_of_nothing():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    found = weight_histogram(layer, ["weight"])
    assert (found.zeros, found.counts.sum(), found.edges[-1]) == (6, 0, 1)
    found = weight_histogram(layer, [])
    assert (found.zeros, found.counts.sum()) == (0, 0)


@pytest.mark.parametrize("pattern", ["3:4", "1:8", "5:16"])
def test_the_pattern_that_was_asked_for_is_named_first(pattern):
    report = sparsity_report(prune(nn.Linear(32, 4), granularity=pattern))
    assert report.targets[0].nm_patterns[0] == pattern
    assert report.nm_patterns[0] == pattern
    assert f"every target satisfies {pattern}" in str(report)


def test_what_is_gone_altogether_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.data *= 1e-3
    report = sparsity_report(prune(model, 0.5, scope="global"))
    assert "Nothing is left of 0.weight." in report.summary()
    assert "Nothing is left" not in sparsity_report(prune(nn.Linear(4, 4), 0.5)).summary()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_statistics_in_parts_are_those_of_the_whole(dtype, monkeypatch):
    monkeypatch.setattr("hf_prune.evaluation.weight_statistics._CHUNK", 7)
    values = torch.randn(9, 11, dtype=torch.float64).mul_(3).add_(100).to(dtype)
    std, mean = torch.std_mean(values.double(), correction=0)
    found = WeightStatistics.of(values)
    assert (found.min, found.max) == (float(values.min()), float(values.max()))
    assert found.mean == pytest.approx(float(mean), rel=1e-14)
    assert found.std == pytest.approx(float(std), rel=1e-12)


def test_the_report_of_a_shrunk_model_says_nothing_of_masks_that_are_gone():
    model = prune(models.tiny_llama(), 0.5, granularity="neuron")
    report = sparsity_report(model)
    report = dataclasses.replace(report, structure=structure_report(shrink(model)))
    assert "are zero" not in str(report)
    assert str(report).count("Shrunk: ") == 1
    assert report.summary().startswith("Shrunk: ")
