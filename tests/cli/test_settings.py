"""The options that are settings of a PruningConfig."""

import dataclasses

import pytest
import typer

from hf_prune import PruningConfig
from hf_prune.cli.main import app
from hf_prune.cli.panels import PANELS
from hf_prune.cli.settings import SELECTION, read_config
from hf_prune.errors import ConfigError

IN_PYTHON_ONLY = {"calibration_order", "schedule"}  # train has options of its own for a schedule


def options_of(command: str) -> list[str]:
    return [option.name for option in typer.main.get_command(app).commands[command].params]


@pytest.mark.parametrize("setting", sorted({f.name for f in dataclasses.fields(PruningConfig)} - IN_PYTHON_ONLY))
def test_each_setting_is_an_option_of_prune(setting):
    assert setting in options_of("prune"), "add it to a table in hf_prune/cli/settings.py, or to IN_PYTHON_ONLY"


def test_settings_stand_in_the_panels_of_the_help():
    shown = {option.name: option.rich_help_panel for option in typer.main.get_command(app).commands["prune"].params}
    assert next(iter(shown)) == "model"
    assert {shown[name] for name in ("sparsity", "criterion", "granularity", "only")} == {"What is removed"}
    budgets = ("target_params", "target_flops", "target_speedup", "workload", "max_drop", "held_out")
    assert {shown[name] for name in budgets} == {"Instead of a sparsity"}
    panels = list(dict.fromkeys(shown.values()))
    assert panels[1:] == [panel for panel in PANELS if panel in panels]


@pytest.mark.parametrize(
    ("command", "option", "panel"),
    [
        ("accelerate", "tolerance", "How"),
        ("trim-vocab", "round_to", "What is removed"),
        ("evaluate", "new_tokens", "Data"),
        ("evaluate", "against", "Models"),
        ("bench", "length", "Data"),
    ],
)
def test_a_panel_says_what_its_options_are_about(command, option, panel):
    options = {option.name: option for option in typer.main.get_command(app).commands[command].params}
    assert options[option].rich_help_panel == panel


def test_a_seed_is_shown_where_something_is_random():
    for command, hidden in (("report", True), ("push", True), ("prune", False), ("auto", False)):
        options = {option.name: option for option in typer.main.get_command(app).commands[command].params}
        assert options["seed"].hidden is hidden


def test_the_preset_that_help_names_is_the_one_that_holds():
    for command, text in (("prune", "balanced with --data"), ("train", "best, calibrated"), ("sweep", "fast")):
        options = {option.name: option for option in typer.main.get_command(app).commands[command].params}
        assert f"[default: {text}" in options["preset"].help


def test_sweep_and_train_take_the_settings_that_select_weights():
    for command in ("prune", "sweep", "train"):
        assert set(SELECTION) <= set(options_of(command))


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("sparsity: 0.5", {"target_speedup": 2.0}, {"granularity": ("head", "neuron"), "sparsity": None}),
        (
            "sparsity: 0.5\nscope: row\ncriterion: wanda",
            {"granularity": "layer", "criterion": "fisher"},
            {"scope": "global"},
        ),
        ("target_params: 0.5", {"sparsity": 0.3, "granularity": "neuron"}, {"target_params": None, "sparsity": 0.3}),
        ("target_params: 0.5", {"target_flops": 0.3}, {"target_params": None, "target_flops": 0.3}),
    ],
)
def test_options_override_what_a_file_says_of_the_same_thing(tmp_path, text, options, expected):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    config = read_config(path, **options)
    assert {name: getattr(config, name) for name in expected} == expected


def test_an_option_that_contradicts_a_file_is_told_from_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("sparsity: 0.5\ngranularity: unstructured\n")
    with pytest.raises(ConfigError) as caught:
        read_config(path, target_speedup=2.0)
    assert "target_speedup=2.0 contradicts granularity='unstructured'" in str(caught.value)
    assert str(caught.value).endswith(f"Options: --target-speedup; in --config {path}: granularity")


def test_layers_alone_need_no_scope():
    for options in ({}, {"preset": "balanced"}, {"has_data": True}):
        assert read_config(None, granularity="layer", **options).scope == "global"
