"""A size becomes a sparsity, or a share of parameters, and the saved file keeps to it."""

import pytest
import torch

from hf_prune import ConfigError, PlanError, PruningConfig, prunable, prune
from hf_prune.checkpoint.target_size import size_in_bytes
from hf_prune.conversion.compression import weights_size
from tests import models


def bert():
    torch.manual_seed(0)
    return prunable(models.tiny_bert(hidden_size=64, intermediate_size=256, num_hidden_layers=4))


def test_sizes_are_read():
    assert size_in_bytes("30MB") == 30_000_000
    assert size_in_bytes("1MiB") == 1 << 20
    assert size_in_bytes(5) == 5
    for bad in ("30", "x", 0, -1, True, 2.5, None):
        with pytest.raises(ConfigError, match=r"target_size is .*: expected a size in bytes"):
            size_in_bytes(bad)


@pytest.mark.parametrize("share", [0.75, 0.4])
def test_the_compressed_file_is_as_large_as_asked_and_no_larger_than_that(tmp_path, share):
    model = bert()
    model.save_pretrained(tmp_path / "dense", compressed=True)
    wanted = round(share * weights_size(tmp_path / "dense"))
    model.prune(target_size=wanted)
    model.save_pretrained(tmp_path / "small", compressed=True)
    assert 0.9 * wanted < weights_size(tmp_path / "small") <= wanted
    assert model.pruning_config.sparsity not in (None, 0.5)  # what is recorded is the sparsity


def test_the_plain_file_is_as_large_as_asked_after_shrinking(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / "dense")
    wanted = round(0.7 * weights_size(tmp_path / "dense"))
    model.prune(target_size=wanted, granularity=("head", "neuron")).shrink()
    model.save_pretrained(tmp_path / "small")
    assert 0.95 * wanted < weights_size(tmp_path / "small") <= wanted


def test_a_plan_has_the_size_too():
    model = bert()
    size = sum(p.numel() for p in model.parameters()) * 2
    assert model.plan(target_size=size).config == model.prune(target_size=size).pruning_config


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"config": 0.5, "target_size": "100KB"}, ConfigError, "sparsity and target_size are both set"),
        ({"sparsity": 0.5, "target_size": "100KB"}, ConfigError, "sparsity and target_size are both set"),
        ({"target_params": 0.5, "target_size": "100KB"}, ConfigError, "target_size and target_params are both set"),
        ({"granularity": "2:4", "target_size": "100KB"}, ConfigError, "which fixes the sparsity at 0.5"),
        ({"target_size": "10MB"}, ConfigError, "compressed file has .* already: ask for less"),
        ({"target_size": "10MB", "granularity": "neuron"}, ConfigError, "plain file has .* already: ask for less"),
        ({"target_size": 2000}, PlanError, "what is not pruned takes .* of a compressed file"),
        ({"target_size": 2000, "granularity": "neuron"}, PlanError, "what is not pruned takes .* of a plain file"),
        ({"max_drop": 1.0}, ConfigError, "call hf_prune.find_sparsity"),
    ],
)
def test_contradictions_and_sizes_out_of_reach_are_said(settings, error, message):
    model = bert()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(error, match=message):
        prune(model, **settings)
    assert all(map(torch.equal, before, model.parameters()))
    assert not model.masks


def test_a_config_may_come_with_a_size():
    config = PruningConfig(preset="fast", granularity="block:2x1")
    model = bert()
    model.prune(config, target_size=sum(p.numel() for p in model.parameters()) * 2)
    assert model.pruning_config.granularity == "block:2x1"
