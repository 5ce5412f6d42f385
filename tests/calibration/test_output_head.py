"""Losses of large vocabularies, chunk by chunk: the same as from all logits at once, and only where that is so."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.calibration.gradients import mean_gradients, squared_gradients
from hf_prune.calibration.input_reader import InputReader
from hf_prune.calibration.output_head import HeadFinder
from hf_prune.calibration.sensitivity import measure_sensitivity
from hf_prune.errors import CalibrationError
from hf_prune.kernels import chunked_logits
from hf_prune.pipeline import prune
from hf_prune.planning.make_plan import make_plan
from hf_prune.planning.plan import targets_of
from hf_prune.planning.resolve import resolve_config
from hf_prune.structured.gate_statistics import gate_statistics
from hf_prune.utils.forward import run_model
from tests import models

SIZES = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CHUNK = 96 * 5  # five tokens of this vocabulary


def built(kind="llama", **settings):
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "capped": (Gemma2Config, Gemma2ForCausalLM),
        "scaled": (CohereConfig, CohereForCausalLM),
        "mixtral": (MixtralConfig, MixtralForCausalLM),
    }[kind]
    return models.fill(model(config(**{**SIZES, **settings}))).eval()


def batch(examples=3, length=14, labels=True, seed=0):
    ids = torch.randint(1, 96, (examples, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    return {**made, "labels": ids.masked_fill(mask == 0, -100)} if labels else made


@contextmanager
def counted_chunks(monkeypatch):
    """Chunks of five tokens inside; yields how many logits each call of the output layer had."""
    sizes = []
    real = chunked_logits.sum_over_tokens

    def counted(states, project, parameters, vocabulary, term):
        def noted(part):
            sizes.append(part.shape[0] * vocabulary)
            return project(part)

        return real(states, noted, parameters, vocabulary, term)

    with monkeypatch.context() as patch:
        patch.setattr(chunked_logits, "CHUNK", CHUNK)
        patch.setattr("hf_prune.calibration.output_head.sum_over_tokens", counted)
        yield sizes


@pytest.mark.parametrize("kind", ["llama", "capped", "scaled"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_and_its_gradients_are_those_of_the_model(kind, tied, monkeypatch):
    model, data = built(kind, tie_word_embeddings=tied), batch()
    names = [name for name, _ in model.named_parameters()]
    expected = mean_gradients(model, names, [data], frozenset({"gradient"}))["gradient"]
    with counted_chunks(monkeypatch) as sizes:
        found = mean_gradients(model, names, [data], frozenset({"gradient"}))["gradient"]
    assert sizes
    assert max(sizes) <= CHUNK
    for name in names:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-5, atol=1e-6 * float(expected[name].abs().max())
        )


@pytest.mark.parametrize("chunked", [False, True])
def test_batches_in_which_no_label_counts(chunked, monkeypatch):
    model, data = built(), batch()
    nothing = {**data, "labels": torch.full_like(data["labels"], -100)}
    if chunked:
        monkeypatch.setattr(chunked_logits, "CHUNK", CHUNK)
    expected = mean_gradients(model, ["lm_head.weight"], [data], frozenset({"gradient"}))["gradient"]
    found = mean_gradients(model, ["lm_head.weight"], [nothing, data, nothing], frozenset({"gradient"}))["gradient"]
    assert torch.equal(found["lm_head.weight"], expected["lm_head.weight"])
    with pytest.raises(CalibrationError, match=r"the loss .* is nan.* no label counts in any of the 2 batches"):
        prune(model, 0.5, criterion="taylor", calibration=[nothing, nothing])


@pytest.mark.parametrize("kind", ["llama", "capped"])
def test_gradients_of_drawn_tokens_are_those_of_the_model(kind, monkeypatch):
    """With the same draws: these are chunk by chunk either way."""
    model, data = built(kind), batch(labels=False)
    names = [name for name, _ in model.named_parameters()]
    with counted_chunks(monkeypatch) as sizes:
        found = squared_gradients(model, names, [data])
        assert sizes
        monkeypatch.setattr(HeadFinder, "__call__", lambda *_: None)
        sizes.clear()
        expected = squared_gradients(model, names, [data])
        assert not sizes
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6 * float(expected[name].max()))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_sensitivities_are_those_of_the_whole_batch(kind, monkeypatch):
    """Window by window with the same draws; 12 tokens go through the layer at a time, as many as a window has."""
    model, data = built(kind), batch(length=12, labels=False)
    targets = targets_of(make_plan(model, resolve_config(0.5, {"criterion": "alps", "objective": "loss"})))
    monkeypatch.setattr(chunked_logits, "CHUNK", 96 * 12)
    monkeypatch.setattr("hf_prune.calibration.batches._MOST_LOGITS", 1)

    def measured():
        with InputReader(model, targets, [data]) as reader:
            reader.order()
            return measure_sensitivity(reader, 0)

    found = measured()
    monkeypatch.setattr(HeadFinder, "__call__", lambda *_: None)
    expected = measured()
    assert found.misplaced == expected.misplaced
    for target in targets:
        name = target.name
        torch.testing.assert_close(found.outputs[name], expected.outputs[name], rtol=1e-4, atol=1e-12)
        if name not in found.misplaced:
            torch.testing.assert_close(found.weights(name, 0, 0), expected.weights(name, 0, 0), rtol=1e-3, atol=1e-4)


def test_gates_are_those_of_the_whole_batch(monkeypatch):
    model, data = built(), batch(length=12, labels=False)
    groups = find_unit_groups(model)
    monkeypatch.setattr(chunked_logits, "CHUNK", 96 * 12)
    monkeypatch.setattr("hf_prune.calibration.batches._MOST_LOGITS", 1)
    found = gate_statistics(model, groups, [data])
    monkeypatch.setattr(HeadFinder, "__call__", lambda *_: None)
    expected = gate_statistics(model, groups, [data])
    for group in groups:
        torch.testing.assert_close(found[group.name].fisher, expected[group.name].fisher, rtol=1e-3, atol=1e-12)


class Doubled(LlamaForCausalLM):
    """Adds to its logits what no output layer does."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + torch.arange(outputs.logits.shape[-1]) / 96
        return outputs


class Smoothed(LlamaForCausalLM):
    """Has a loss of its own."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss * 1.01
        return outputs


def test_it_is_left_where_it_is_if_anything_else_happens_to_logits_or_losses(monkeypatch):
    monkeypatch.setattr(chunked_logits, "CHUNK", CHUNK)
    labelled, plain = batch(), batch(labels=False)
    assert HeadFinder(built())(labelled) is not None
    assert HeadFinder(built())({**labelled, "inputs_embeds": torch.ones(3, 14, 16)}) is None
    assert HeadFinder(built(), seen=[(model := built()).lm_head])(plain) is not None  # another model's layer
    assert HeadFinder(model, seen=[model.lm_head])(plain) is None
    doubled = models.fill(Doubled(LlamaConfig(**SIZES))).eval()
    smoothed = models.fill(Smoothed(LlamaConfig(**SIZES))).eval()
    assert HeadFinder(doubled)(plain) is None
    assert HeadFinder(smoothed)(labelled) is None
    assert HeadFinder(smoothed)(plain) is not None
    balanced = built("mixtral", output_router_logits=True)  # adds a loss of its routers
    assert HeadFinder(balanced)(labelled) is None
    found = mean_gradients(smoothed, ["lm_head.weight"], [labelled], frozenset({"gradient"}))
    usual = mean_gradients(built(), ["lm_head.weight"], [labelled], frozenset({"gradient"}))
    torch.testing.assert_close(found["gradient"]["lm_head.weight"], usual["gradient"]["lm_head.weight"] * 1.01)


def test_caps_are_found_although_logits_are_small(monkeypatch):
    monkeypatch.setattr(chunked_logits, "CHUNK", CHUNK)
    model = built("capped", final_logit_softcapping=30.0)
    head = HeadFinder(model)(batch())
    assert head.cap == 30
    assert float(head.logits(torch.randn(4, 16) * 1e6).detach().abs().max()) <= 30
    assert HeadFinder(built("scaled", logit_scale=0.0625))(batch()).scale == pytest.approx(0.0625, rel=1e-6)


def test_small_vocabularies_run_as_ever():
    assert HeadFinder(built())(batch()) is None


def test_infinite_logits_are_refused(monkeypatch):
    model = built()
    with counted_chunks(monkeypatch):
        head = HeadFinder(model)(data := batch(labels=False))
        model.lm_head.weight.data[3, 3] = torch.inf
        with pytest.raises(CalibrationError, match="outputs for a calibration batch are not finite"):
            head.sampled(partial(run_model, model), data, None, torch.Generator())


def test_classes_are_drawn_by_their_probabilities():
    probabilities = torch.tensor([0.0, 0.5, 0.1, 0.0, 0.4, 0.0]).repeat(20_000, 1)
    drawn = chunked_logits.draw(probabilities, torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 1)
    counts = drawn[:, 0].bincount(minlength=6) / 20_000
    assert counts[[0, 3, 5]].tolist() == [0, 0, 0]
    assert torch.allclose(counts, probabilities[0], atol=0.02)  # four standard deviations and more
    assert torch.equal(drawn, chunked_logits.draw(probabilities, torch.Generator().manual_seed(0)))


def test_a_class_of_probability_zero_is_never_drawn(monkeypatch):
    """Not even by the largest random number, which rounding may take to the sum of all."""
    monkeypatch.setattr("torch.rand", lambda *shape, **_: torch.ones(shape[0]) - 2**-24)
    assert chunked_logits.draw(torch.tensor([[0.25, 0.25, 0.0, 0.0]]), torch.Generator()).tolist() == [[1]]
