"""The options that are settings of a PruningConfig."""

import dataclasses

import pytest
import typer

from hf_prune import PruningConfig
from hf_prune.cli.main import app

IN_PYTHON_ONLY = {"calibration_order", "schedule"}  # train has options of its own for a schedule


def options_of(command: str) -> list[str]:
    return [option.name for option in typer.main.get_command(app).commands[command].params]


@pytest.mark.parametrize("setting", sorted({f.name for f in dataclasses.fields(PruningConfig)} - IN_PYTHON_ONLY))
def test_each_setting_is_an_option_of_prune(setting):
    assert setting in options_of("prune"), "add it to a table in hf_prune/cli/settings.py, or to IN_PYTHON_ONLY"


def test_settings_stand_where_they_were_asked_for():
    names = options_of("prune")
    assert names[:4] == ["model", "out", "sparsity", "max_drop"]
    assert names[names.index("dry_run") + 1 : names.index("threads")] == [
        "target_params",
        "target_flops",
        "target_speedup",
        "workload",
    ]


def test_sweep_and_train_take_the_settings_that_select_weights():
    selection = ["granularity", "scope", "allocation", "target_modules", "exclude_modules", "repair"]
    for command in ("prune", "sweep", "train"):
        names = options_of(command)
        start = names.index("granularity")
        assert names[start : start + len(selection)] == selection
