"""What ``import hf_prune`` offers, and the flow that the README shows."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys

import pytest
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_prune
from tests import models

MODULES = sorted(m.name for m in pkgutil.walk_packages(hf_prune.__path__, "hf_prune."))


@pytest.mark.parametrize("name", hf_prune.__all__)
def test_public_name_resolves_and_is_documented(name):
    value = getattr(hf_prune, name)
    assert name in dir(hf_prune)
    assert (inspect.getdoc(value) or "").strip()
    home = getattr(value, "__module__", None)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__name__ == name
        assert home.startswith("hf_prune.")
        assert getattr(importlib.import_module(home), name) is value


def test_no_public_name_is_that_of_a_module():
    """Importing such a module would put it in the place of what it holds."""
    assert not {f"hf_prune.{name}" for name in hf_prune.__all__} & set(MODULES)


@pytest.mark.parametrize("name", [n for n in hf_prune.__all__ if inspect.isclass(getattr(hf_prune, n))])
def test_public_methods_are_documented(name):
    cls = getattr(hf_prune, name)
    undocumented = [
        attribute
        for attribute, value in vars(cls).items()
        if not attribute.startswith("_")
        and (callable(value) or isinstance(value, property | classmethod | staticmethod))
        and not inspect.getdoc(getattr(cls, attribute))
    ]
    assert undocumented == []


def test_all_is_sorted_and_complete():
    assert hf_prune.__all__ == sorted(set(hf_prune.__all__))
    errors = importlib.import_module("hf_prune.errors")
    raised = {n for n, v in vars(errors).items() if inspect.isclass(v) and issubclass(v, Exception)}
    assert raised <= set(hf_prune.__all__)


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'hf_prune' has no attribute 'prunee'"):
        _ = hf_prune.prunee


def test_errors_are_also_what_they_resemble():
    for name in ("ConfigError", "PlanError", "CalibrationError", "DataError"):
        assert issubclass(getattr(hf_prune, name), (hf_prune.HfPruneError, ValueError))
        assert issubclass(getattr(hf_prune, name), ValueError)
    for name in ("MaskError", "CheckpointError", "SweepError"):
        assert issubclass(getattr(hf_prune, name), RuntimeError)
    assert issubclass(hf_prune.ModelTypeError, TypeError)
    assert issubclass(hf_prune.UnknownNameError, hf_prune.ConfigError)


CHEAP = """
import sys
import hf_prune
heavy = {"torch", "transformers", "matplotlib", "gradio", "datasets", "evaluate", "typer"} & set(sys.modules)
assert not heavy, heavy
hf_prune.PruningConfig  # needs no model
assert "transformers.models.bert" not in sys.modules and "matplotlib" not in sys.modules
hf_prune.sparsity_report
assert "matplotlib" not in sys.modules and "gradio" not in sys.modules
"""


def test_import_is_cheap():
    subprocess.run([sys.executable, "-c", CHEAP], check=True, timeout=60)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_the_flow_of_the_readme(tmp_path, capsys):
    models.tiny_classifier().save_pretrained(tmp_path / "dense")
    models.tiny_tokenizer().save_pretrained(tmp_path / "dense")
    data = Dataset.from_dict(models.tiny_sentences())

    from hf_prune import AutoPrunedModelForSequenceClassification, PruningConfig, compare, evaluate_classification

    model = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    dense = evaluate_classification(model, tokenizer, data)
    config = PruningConfig(sparsity=0.6, scope="global", exclude_modules=["classifier"])
    print(model.plan(config))
    assert "60.00 %" in capsys.readouterr().out
    model.prune(config)
    print(model.sparsity_report())
    assert "(60.00 %)" in capsys.readouterr().out
    comparison = compare(dense, evaluate_classification(model, tokenizer, data))
    assert comparison.n == 40
    model.save_pretrained(tmp_path / "pruned")

    again = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path / "pruned").prune(0.8, scope="global")
    assert again.sparsity_report().target_sparsity == pytest.approx(0.8, abs=0.001)
    again.make_permanent().save_pretrained(tmp_path / "pruned")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
    found = evaluate_classification(plain, tokenizer, data).predictions
    assert found == evaluate_classification(again, tokenizer, data).predictions
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["architectures"] == [type(plain).__name__]
