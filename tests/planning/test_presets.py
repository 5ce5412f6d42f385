"""Presets: rows of ordinary settings, beneath those that are given."""

import copy
import dataclasses

import pytest
import torch

from hf_prune import ConfigError, PruningConfig, UnknownNameError, prune, sparsity_report
from hf_prune.planning.presets import METHOD_SETTINGS, PRESETS, expectation, resolve_settings
from hf_prune.planning.resolve import resolve_config
from hf_prune.planning.traits import preset_of
from tests import models
from tests.models import tiny_batches

UNITS = {"granularity": ("head", "neuron")}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "granularity", ["unstructured", "2:4", "block:4x1", "row", ("head", "neuron"), "head", "layer", "expert"]
)
def test_every_preset_is_a_config_of_every_granularity_and_is_recognised(name, granularity):
    config = PruningConfig(granularity=granularity, preset=name)
    same = [other for other in PRESETS if PruningConfig(granularity=granularity, preset=other) == config]
    assert preset_of(config) in same
    assert PruningConfig.from_json(config.to_json()) == config
    assert "preset" not in config.to_dict()  # what is recorded is the settings


@pytest.mark.parametrize("name", PRESETS)
def test_the_rows_are_settings_and_say_truly_whether_they_need_data(name):
    preset = PRESETS[name]
    for settings, given in ((preset.weights, {}), (preset.units, UNITS)):
        config = PruningConfig(**given, preset=name)
        assert config == PruningConfig(**given, **settings)
        assert settings.keys() <= METHOD_SETTINGS <= {field.name for field in dataclasses.fields(config)}
        assert config.needs_data == (preset.needs == "texts")
    assert expectation(name, removes_units=False) != expectation(name, removes_units=True)


def test_what_is_given_overrides_the_row():
    assert PruningConfig(0.8, preset="best", repair=None).repair is None
    assert PruningConfig(0.8, preset="best", allocation="uniform").allocation == "uniform"
    assert PruningConfig(0.8, preset="best", criterion="magnitude").criterion == "magnitude"
    assert PruningConfig(0.8, preset="balanced", scope="global", criterion="magnitude").scope == "global"
    one_pass = PruningConfig(0.8, preset="best", calibration_order="one_pass")
    assert (one_pass.criterion, one_pass.objective) == ("alps", "layer")


def test_replace_takes_a_preset_and_keeps_the_amount():
    config = PruningConfig(0.3, seed=4).replace(preset="best")
    assert config == PruningConfig(0.3, seed=4, preset="best")
    units = PruningConfig(target_params=0.7, preset="fast").replace(preset="balanced")
    assert units == PruningConfig(target_params=0.7, preset="balanced")
    assert dataclasses.replace(config, sparsity=0.5) == PruningConfig(0.5, seed=4, preset="best")
    assert copy.deepcopy(config) == config


def test_unknown_presets_are_named():
    with pytest.raises(UnknownNameError, match=r"unknown preset 'bst'.*best"):
        PruningConfig(preset="bst")
    with pytest.raises(UnknownNameError, match="unknown preset 3"):
        PruningConfig(preset=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparcity'"):
        PruningConfig(sparcity=0.5)


@pytest.mark.parametrize("target", ["target_params", "target_flops", "target_speedup"])
def test_a_target_alone_means_heads_and_neurons(target):
    value = 2.0 if target == "target_speedup" else 0.5
    assert PruningConfig(**{target: value}).granularity == ("head", "neuron")
    with pytest.raises(ConfigError, match="makes no tensor smaller"):
        PruningConfig(**{target: value}, granularity="unstructured")
    config = resolve_config(None, {target: value}, has_data=True)
    assert (config.granularity, config.criterion, config.repair) == (("head", "neuron"), "fisher", "least_squares")


def test_data_makes_the_preset_balanced_unless_a_method_is_named():
    assert preset_of(resolve_config(0.8, {}, has_data=True)) == "balanced"
    assert preset_of(resolve_config(0.8, {})) == "fast"
    assert preset_of(resolve_config(0.8, {"preset": "best"})) == "best"
    assert resolve_config(PruningConfig(0.8), {}, has_data=True) == PruningConfig(0.8)  # a config is complete
    for setting, value in {"criterion": "magnitude", "scope": "global", "repair": "least_squares"}.items():
        assert resolve_config(0.8, {setting: value}, has_data=True).criterion == "magnitude"


def test_pruning_with_data_uses_the_balanced_settings():
    model = models.tiny_bert()
    batches = tiny_batches(model)
    by_default = prune(copy.deepcopy(model), 0.6, calibration=batches)
    named = prune(copy.deepcopy(model), PruningConfig(0.6, preset="balanced"), calibration=batches)
    plain = prune(copy.deepcopy(model), 0.6)
    assert all(map(torch.equal, by_default.parameters(), named.parameters()))
    assert not all(map(torch.equal, by_default.parameters(), plain.parameters()))


KINDS = ("tiny_bert", "tiny_gpt2", "tiny_vit", "tiny_resnet")


@pytest.mark.parametrize(
    ("name", "build"), [(name, KINDS[(row + step) % 4]) for row, name in enumerate(PRESETS) for step in (0, 1)]
)
def test_every_preset_prunes_models_of_two_kinds(name, build):
    model = getattr(models, build)()
    batches = tiny_batches(model, sizes=(4,) * 4) if PRESETS[name].needs == "texts" else None
    settings = {"polish": {"epochs": 1, "learning_rate": 1e-4}} if name == "best+polish" else {}
    prune(model, 0.5, calibration=batches, preset=name, **settings)
    assert sparsity_report(model).target_sparsity == pytest.approx(0.5, abs=0.01)


def test_settings_are_not_changed():
    given = {"preset": "best", "sparsity": 0.8}
    resolve_settings(given)
    assert given == {"preset": "best", "sparsity": 0.8}
