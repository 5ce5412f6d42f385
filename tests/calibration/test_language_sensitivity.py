"""Sensitivities of language models are measured on some of the tokens, and inputs tell how the outputs changed."""

import pytest
import torch

from hf_prune import PruningConfig, prune, sparsity_report
from hf_prune.calibration import sensitivity as module
from hf_prune.calibration.input_reader import CACHE_BYTES, InputReader
from hf_prune.calibration.output_matching import OutputMatcher
from hf_prune.calibration.sensitivity import measure_sensitivity, measured_batches, sensitivity_of
from hf_prune.planning.make_plan import make_plan
from hf_prune.planning.plan import targets_of
from tests import models
from tests.models import tiny_batches

LOSS = PruningConfig(criterion="alps", objective="loss")


def test_of_a_language_model_some_batches_are_measured_spread_over_all(monkeypatch):
    llama = models.tiny_llama()
    batches = tiny_batches(llama, sizes=(2,) * 10)  # 12 tokens each
    assert measured_batches(llama, batches) == batches
    monkeypatch.setattr(module, "_MOST_TOKENS", 60)
    assert [id(b) for b in measured_batches(llama, batches)] == [id(batches[i]) for i in (0, 2, 4, 6, 8)]
    monkeypatch.setattr(module, "_MOST_TOKENS", 1)
    assert [id(b) for b in measured_batches(llama, batches)] == [id(batches[0])]
    bert = models.tiny_bert()
    assert len(measured_batches(bert, tiny_batches(bert, sizes=(2,) * 10))) == 10


def test_what_was_measured_on_some_batches_weighs_no_token(monkeypatch):
    llama = models.tiny_llama()
    batches = tiny_batches(llama, sizes=(2,) * 4)
    with InputReader(llama, targets_of(make_plan(llama, LOSS)), batches) as reader:
        reader.order()
        whole = sensitivity_of(reader, 0)
        assert not whole.tokens_alike
        monkeypatch.setattr(module, "_MOST_TOKENS", 24)
        part = sensitivity_of(reader, 0)
    name = "model.layers.0.mlp.down_proj.weight"
    assert part.tokens_alike
    assert part.weights(name, 3, 0) is None
    assert part.outputs.keys() == whole.outputs.keys()
    with InputReader(llama, reader.targets, batches[::2]) as some:
        some.order()
        expected = measure_sensitivity(some, 0)
    assert torch.equal(part.outputs[name], expected.outputs[name])


@pytest.mark.parametrize("build", [models.tiny_llama, models.tiny_gpt2])
def test_changes_told_by_inputs_are_those_of_the_outputs(build, monkeypatch):
    def gathered(by_input):
        model = build()
        batches = tiny_batches(model, sizes=(4, 2))
        batches[0]["attention_mask"][0, 4:] = 0
        targets = targets_of(make_plan(model, LOSS))
        if not by_input:
            monkeypatch.setattr(OutputMatcher, "_is_plain", lambda *_: False)
        with InputReader(model, targets, batches) as reader:
            steps = reader.order()
            sensitivity = measure_sensitivity(reader, 0)
            sensitivity.forget_tokens()
            statistics = {}
            with OutputMatcher(model, targets, batches, sensitivity, CACHE_BYTES) as matcher:
                for segment in matcher.segments(steps):
                    for step in segment:
                        statistics |= matcher.gather(reader, step)
                        with torch.no_grad():
                            for target in step:
                                model.get_parameter(target.name).mul_(0.7)
                        reader.finish(step)
        return statistics

    by_inputs, by_outputs = gathered(True), gathered(False)
    changed = [name for name, values in by_outputs.items() if float(values["output_change"].abs().max()) > 1e-4]
    assert len(changed) > 5
    for name, values in by_outputs.items():
        assert by_inputs[name].keys() == values.keys()
        for key, value in values.items():
            torch.testing.assert_close(by_inputs[name][key], value, rtol=1e-3, atol=1e-5)


def test_a_language_model_is_pruned_so_with_many_tokens(monkeypatch):
    monkeypatch.setattr(module, "_MOST_TOKENS", 24)
    llama = models.tiny_llama()
    prune(llama, 0.5, preset="best", calibration=tiny_batches(llama, sizes=(4,) * 4))
    assert sparsity_report(llama).target_sparsity == pytest.approx(0.5, abs=0.01)
