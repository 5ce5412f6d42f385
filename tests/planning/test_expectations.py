"""What users are told of language models before they are disappointed."""

import inspect
import warnings

import pytest
import torch

from hf_prune import PrunedModelMixin, PruningConfig, prune, prune_stream, token_windows
from hf_prune.planning.expectations import MAGNITUDE_COST, is_language_model
from hf_prune.utils.notices import QualityWarning
from tests import models
from tests.models import tiny_batches

EXPECTED = rf"LlamaForCausalLM is pruned by magnitude.*{MAGNITUDE_COST}.*'balanced'"


def test_language_models_are_known_by_their_class():
    assert is_language_model("LlamaForCausalLM")
    assert is_language_model("GPT2LMHeadModel")
    assert not any(map(is_language_model, ("BertForMaskedLM", "T5ForConditionalGeneration", "GPT2Model", "")))


@pytest.mark.parametrize("settings", [{}, {"preset": "fast"}, {"criterion": "magnitude", "scope": "global"}])
def test_magnitude_on_a_language_model_is_a_warning_with_what_it_was_measured_to_cost(settings):
    with pytest.warns(QualityWarning, match=EXPECTED):
        prune(models.tiny_llama(), 0.5, **settings)


def test_a_stream_warns_too(tmp_path):
    models.tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.warns(QualityWarning, match=EXPECTED):
        prune_stream(tmp_path / "dense", 0.5, tmp_path / "out")


def test_nothing_is_said_of_other_models_methods_or_dry_runs():
    llama = models.tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error", QualityWarning)
        prune(models.tiny_bert(), 0.5)
        prune(llama, 0.5, dry_run=True)
        prune(llama, 0.5, calibration=tiny_batches(llama))  # the preset is "balanced" then


def test_what_says_nothing_of_a_method_gets_one_that_fits():
    """With texts at hand, a language model is not pruned by magnitude, and its output embedding stays as it is."""
    llama = models.tiny_llama()
    head = llama.get_output_embeddings().weight.detach().clone()
    text = " ".join(models.tiny_sentences(40, 0)["sentence"])
    windows = token_windows([text], models.tiny_tokenizer(), n=2, length=16)
    plan = prune(llama, 0.5, calibration=windows, dry_run=True)
    assert (plan.config.criterion, plan.config.objective, plan.config.allocation) == ("sparsegpt", "loss", "fisher")
    assert not any("lm_head" in t.target.name or "embed" in t.target.name for t in plan.tensors)
    prune(llama, 0.5, calibration=windows)
    assert llama.get_output_embeddings().weight.equal(head)


def test_where_no_method_is_named_the_preset_says_what_to_expect(monkeypatch, caplog):
    """A log line in programs; a warning to whoever works interactively without data."""
    caplog.set_level("INFO", logger="hf_prune")
    prune(torch.nn.Linear(4, 4), 0.5)
    assert [record.message[:15] for record in caplog.records] == ["preset 'fast': "]
    for settings in ({"criterion": "magnitude"}, {"preset": "fast"}, {"config": PruningConfig(0.5)}):
        prune(torch.nn.Linear(4, 4), **{"config": 0.5, **settings})
    assert len(caplog.records) == 1
    monkeypatch.setattr("hf_prune.planning.expectations.is_interactive", lambda: True)
    with pytest.warns(QualityWarning, match=r"preset 'fast': .* with preset 'balanced', which needs --data or calib"):
        prune(torch.nn.Linear(4, 4), 0.5)


@pytest.mark.parametrize("function", [prune, PrunedModelMixin.prune, PrunedModelMixin.plan])
def test_signatures_say_what_is_true(function):
    parameters = inspect.signature(function).parameters
    assert {"target_size", "criterion", "preset"} <= set(parameters)
    assert [repr(parameters[name].default) for name in ("criterion", "steps")] == ["<of the preset>", "1"]
    assert "target_size:" in function.__doc__
