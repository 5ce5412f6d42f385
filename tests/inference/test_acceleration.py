"""accelerate(): the right kernels, the same answers, and the plain model back."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from hf_prune import accelerate, decelerate, prunable, shrink, sparsity_report
from hf_prune.errors import CheckpointError, ConfigError, KernelError, PlanError
from hf_prune.inference.acceleration import accelerate as module
from hf_prune.inference.acceleration import choose, install
from hf_prune.inference.acceleration.choose import Choice, limits
from hf_prune.inference.acceleration.kernels import Csr, Dense, Lower, OneDNN, Sparse, candidates, make_kernel
from hf_prune.inference.acceleration.layers import Accelerated, Ranges, is_accelerated, switch_on
from hf_prune.inference.acceleration.observe import difference_to
from hf_prune.inference.timing import Timings
from hf_prune.kernels.sparse.build import kernel_problem

INPUTS = {"input_ids": torch.arange(12).view(2, 6) + 3}


@pytest.fixture(scope="module", autouse=True)
def kernel():
    if (problem := kernel_problem()) is not None:
        pytest.skip(problem)


@pytest.fixture
def quick(monkeypatch):
    """Times that need no clock: the sparse kernel wins from 4 tokens on, and the model gains."""
    seconds = {"dense": 4.0, "onednn": 3.0, "csr": 5.0, "before": 2.0, "after": 1.0}

    def timed(runs, **_):
        for run in runs.values():
            run()
        return {name: Timings(*[(seconds.get(name, 1.0),) * 9] * 2) for name in runs}

    monkeypatch.setattr(choose, "time_together", timed)
    monkeypatch.setattr(install, "time_together", timed)


def bert(sparsity=0.8):
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48, vocab_size=50)
    model = prunable(BertForSequenceClassification(config)).eval()
    return model.prune(sparsity) if sparsity else model


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_every_kernel_computes_the_layer():
    torch.manual_seed(0)
    weight = torch.randn(40, 600) * (torch.rand(40, 600) > 0.7)
    for bias in (None, torch.randn(40)):
        for shape in ((600,), (5, 600), (2, 3, 600)):
            x = torch.randn(shape)
            expected = torch.nn.functional.linear(x, weight, bias)
            names = []
            for name in candidates(weight, [torch.bfloat16]):
                kernel = make_kernel(name, weight)
                names.append(name)
                assert kernel.name == name
                exact = "bfloat16" not in name
                torch.testing.assert_close(
                    kernel(x, weight, bias), expected, atol=1e-4 if exact else 0.5, rtol=1e-4 if exact else 0.05
                )
    assert names == [
        "dense", "onednn", "sparse:192", "sparse:384", "sparse:65536", "csr",
        "dense:bfloat16", "sparse:192:bfloat16", "sparse:384:bfloat16", "sparse:65536:bfloat16",
    ]  # fmt: skip


def test_the_kernel_is_chosen_by_the_number_of_tokens():
    weight = torch.eye(8)
    dense, sparse = Dense(), Sparse(weight, 8)
    ranges = Ranges((2, 32), (dense, sparse, OneDNN()))
    assert [ranges.kernel_for(n).name for n in (1, 2, 3, 32, 33, 10_000)] == [
        "dense", "dense", "sparse:8", "sparse:8", "onednn", "onednn",
    ]  # fmt: skip
    assert limits((1, 4, 64)) == (2, 16)
    assert ranges.exact() is sparse
    assert ranges.reads_weight


def test_noise_is_no_gain(monkeypatch):
    wall = {"dense": (1.0, 2.0) * 6, "onednn": (2.0, 1.0) * 6}  # sometimes faster, sometimes slower

    def timed(runs, **_):
        return {name: Timings(wall[name], wall[name]) for name in runs}

    monkeypatch.setattr(choose, "time_together", timed)
    assert [c.kernel for c in choose.choose(torch.ones(4, 4), None, [1, 8], [])] == ["dense", "dense"]


def test_answers_stay_and_weights_come_back(quick):
    model = bert()
    before, outputs = weights(model), model(**INPUTS).logits
    report = model.accelerate(INPUTS)
    assert report.speedup is not None
    assert len(report.accelerated) == 14  # every Linear but none left out: 2 layers of 6, the pooler, the classifier
    torch.testing.assert_close(model(**INPUTS).logits, outputs, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model(**INPUTS).logits, outputs, atol=1e-5, rtol=1e-5)
    assert same(before, weights(model))
    assert report.bytes_after < report.bytes_before
    assert sparsity_report(model).target_sparsity == pytest.approx(0.8, abs=0.01)
    query = model.bert.encoder.layer[0].attention.self.query
    assert isinstance(query, torch.nn.Linear)
    assert query.weight.is_meta  # only its sparse format is kept
    assert model.decelerate() is model
    assert not is_accelerated(model)
    assert type(query) is torch.nn.Linear
    assert same(before, weights(model))
    assert torch.equal(model(**INPUTS).logits, outputs)
    model.prune(0.9)  # the masks are still there


def test_the_plain_model_is_saved(quick, tmp_path):
    model = bert()
    before = weights(model)
    model.accelerate(INPUTS)
    model.save_pretrained(tmp_path / "pruned")
    accelerated = BertForSequenceClassification.from_pretrained(tmp_path / "pruned")
    assert same(before, weights(accelerated))
    assert not is_accelerated(accelerated)
    model.save_pretrained(tmp_path / "packed", compressed=True)
    assert same(before, weights(BertForSequenceClassification.from_pretrained(tmp_path / "packed")))
    plain = BertForSequenceClassification(model.config).eval()
    plain.load_state_dict(before)
    accelerate(plain, INPUTS)
    plain.save_pretrained(tmp_path / "plain")  # by transformers alone
    assert same(before, weights(BertForSequenceClassification.from_pretrained(tmp_path / "plain")))


def test_copies_and_pickles_answer_alike(quick):
    model = bert()
    model.accelerate(INPUTS)
    outputs = model(**INPUTS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_accelerated(other)
        assert torch.equal(other(**INPUTS).logits, outputs)
        decelerate(other)
        assert is_accelerated(model)
        assert same(weights(model), weights(other))


def test_training_and_changes_are_refused(quick):
    model = bert()
    model.accelerate(INPUTS)
    with pytest.raises(KernelError, match="decelerate"):
        model(**INPUTS).logits.sum().backward()
    with pytest.raises(KernelError, match="decelerate"):
        model.train()(**INPUTS)
    model.eval()
    before = weights(model)
    for change in (lambda: model.prune(0.9), lambda: shrink(model), lambda: model.discard_masks()):
        with pytest.raises((PlanError, RuntimeError), match=r"decelerate|keep_dense"):
            change()
    with pytest.raises(KernelError, match="accelerated already"):
        model.accelerate(INPUTS)
    assert same(before, weights(model))


def test_moving_or_casting_ends_it(quick):
    model = bert()
    expected = copy.deepcopy(model).bfloat16()
    model.accelerate(INPUTS)
    model.to("cpu")
    assert is_accelerated(model)
    with pytest.warns(UserWarning, match="moved or cast"):
        model.bfloat16()
    assert not is_accelerated(model)
    assert same(weights(expected), weights(model))
    assert torch.equal(model(**INPUTS).logits, expected(**INPUTS).logits)


def test_conv1d_and_generation_with_a_cache(quick):
    torch.manual_seed(0)
    settings = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=50, n_positions=64, **settings)
    model = prunable(GPT2LMHeadModel(config)).eval().prune(0.8)
    before, tokens = weights(model), model.generate(**INPUTS, max_new_tokens=8, do_sample=False)
    report = model.accelerate(INPUTS)
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    assert "transformer.h.0.attn.c_attn" in report.accelerated
    assert torch.equal(model.generate(**INPUTS, max_new_tokens=8, do_sample=False), tokens)
    assert not model.lm_head.weight.is_meta  # it is the embedding too
    assert same(before, weights(model))
    model.decelerate()
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D
    assert same(before, weights(model))


def test_bfloat16_models_and_lower_precision(quick):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=48, vocab_size=50,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = prunable(LlamaForCausalLM(config)).eval().prune(0.7)
    with pytest.raises(KernelError, match="tolerance"):
        model.accelerate(INPUTS, dtypes=["bfloat16"], tolerance=1e-9)
    assert not is_accelerated(model)
    half = copy.deepcopy(model).bfloat16()
    outputs = half(**INPUTS).logits
    half.accelerate(INPUTS, tolerance=0.05)
    torch.testing.assert_close(half(**INPUTS).logits, outputs, atol=0.05, rtol=0.1)
    lower = Lower(torch.eye(4), torch.bfloat16, "dense")
    assert lower.nbytes == 32
    with pytest.raises(ConfigError, match="bfloat16"):
        model.accelerate(INPUTS, dtypes=["float8"])


def test_a_saved_choice_is_taken_without_timing(quick, tmp_path, monkeypatch):
    model = bert()
    report = model.accelerate(INPUTS)
    path = tmp_path / "acceleration.json"
    report.save(path)
    assert "values" not in path.read_text()
    model.decelerate()

    def must_not(*args):
        raise AssertionError("timed again")

    monkeypatch.setattr(module, "choose", must_not)
    again = model.accelerate(INPUTS, saved=path)
    assert again.kinds == report.kinds
    assert is_accelerated(model)
    model.decelerate()
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "machine": {**saved["machine"], "cpu": "another"}}))
    with pytest.raises(KernelError, match="cpu another"):
        model.accelerate(INPUTS, saved=path)
    path.write_text(json.dumps(saved).replace("encoder.layer.1", "encoder.layer.7"))
    with pytest.raises(KernelError, match="another model"):
        model.accelerate(INPUTS, saved=path)
    for damaged in ("[]", "{}", "not json", json.dumps({**saved, "kinds": [{"layers": 3}]})):
        path.write_text(damaged)
        with pytest.raises(CheckpointError):
            model.accelerate(INPUTS, saved=path)
    assert not is_accelerated(model)


def test_no_layer_gains_is_an_answer(monkeypatch):
    model = bert(sparsity=0)
    monkeypatch.setattr(module, "choose", lambda weight, bias, tokens, dtypes: [Choice(1, "dense", 1.0, 1.0, 1.0)])
    report = model.accelerate(INPUTS)
    assert report.speedup is None
    assert "No layer gains" in str(report)
    assert not is_accelerated(model)


def test_a_model_that_does_not_gain_stays_as_it_is(quick, monkeypatch):
    def timed(runs, **_):
        return {name: Timings((1.0,) * 9, (1.0,) * 9) for name in runs}

    monkeypatch.setattr(install, "time_together", timed)
    model = bert()
    report = model.accelerate(INPUTS)
    assert report.speedup is None
    assert "the model does not" in str(report)
    assert not report.accelerated
    assert not is_accelerated(model)


def test_weights_that_are_read_without_a_call_stay(quick):
    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            return torch.nn.functional.linear(self.called(x), self.read.weight)

    model = Reads().eval()
    with torch.no_grad():
        for layer in (model.called, model.read):
            layer.weight[:, 1:].zero_()
    accelerate(model, {"x": torch.randn(4, 8)})
    assert isinstance(model.called, Accelerated)
    assert not isinstance(model.read, Accelerated)


def test_subnormal_activations_are_noticed(quick):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[0].weight[:, 1:].zero_()
    model.forward = lambda x: model[0](x)  # takes its input by name
    report = accelerate(model, {"x": torch.full((2, 4), 1e-40)})
    assert "set_flush_denormal" in str(report)


def test_csr_does_not_warn():
    assert Csr(torch.eye(3))(torch.ones(2, 3), None, None).tolist() == [[1.0] * 3] * 2


def test_loading_other_weights_ends_it(quick):
    model, other = bert(), bert(0.9)
    model.accelerate(INPUTS)
    with pytest.warns(UserWarning, match="other weights were loaded"):
        model.load_state_dict(other.state_dict())
    assert not is_accelerated(model)
    assert same(weights(model), weights(other))


@pytest.mark.parametrize("winner", ["dense", "onednn", "csr", "sparse:65536"])
def test_copies_autocast_and_names_of_arguments_with_every_kernel(winner, monkeypatch):
    layer = torch.nn.Linear(16, 8)
    with torch.no_grad():
        layer.weight[:, 4:].zero_()
    model = torch.nn.Sequential(layer).eval()
    x = torch.randn(3, 16)
    expected = layer(x)
    assert winner in candidates(layer.weight, [])
    switch_on(layer, Ranges((), (make_kernel(winner, layer.weight),)))
    torch.testing.assert_close(layer(input=x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x.bfloat16()).float(), expected, atol=0.05, rtol=0.05)


def test_not_a_number_is_no_small_difference():
    class Broken(torch.nn.Module):
        def forward(self, x):
            return x, x * torch.tensor([1.0, float("nan")])

    before = [torch.ones(2), torch.ones(2)]
    assert math.isnan(difference_to(before, Broken(), {"x": torch.ones(2)}))
    nan_before = [torch.ones(2), torch.tensor([1.0, float("nan")])]
    assert difference_to(nan_before, Broken(), {"x": torch.ones(2)}) == 0


def test_the_first_parameter_tells_where_a_model_is(quick):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).eval()
    with torch.no_grad():
        for layer in model:
            layer.weight[:, 1:].zero_()
    wrapper = torch.nn.Module()
    wrapper.inner, wrapper.forward = model, lambda x: model(x)
    wrapper.eval()
    accelerate(wrapper, {"x": torch.randn(4, 8)})
    assert isinstance(model[0], Accelerated)
    assert not model[0].weight.is_meta
    assert model[1].weight.is_meta


def test_a_model_without_a_config_needs_inputs():
    with pytest.raises(PlanError, match="inputs="):
        accelerate(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_negative_zeros_come_back(quick):
    layer = torch.nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight *= torch.arange(8) < 2  # leaves negative zeros
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), layer).eval()
    model.forward = lambda x: layer(x)  # takes its input by name
    before = layer.weight.detach().clone()
    accelerate(model, {"x": torch.randn(4, 8)})
    assert isinstance(layer, Accelerated)
    decelerate(model)
    assert torch.equal(layer.weight.view(torch.int32), before.view(torch.int32))


def test_layers_on_both_sides_of_the_least_sparsity_are_one_kind(quick):
    model = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 10)).eval()
    with torch.no_grad():
        for layer, zeros in zip(model, (31, 29), strict=True):  # of 100: the second alone would not try sparse kernels
            layer.weight.view(-1)[:zeros] = 0
    wrapper = torch.nn.Module()
    wrapper.inner, wrapper.forward = model, lambda x: model(x)
    x = torch.randn(4, 10)
    with torch.no_grad():
        expected = model(x)
    report = accelerate(wrapper.eval(), {"x": x})
    assert set(report.accelerated) == {"inner.0", "inner.1"}
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", ["", "sparse", "sparse:0", "sparse:x", "sparse:8:", "csr:8", "dense:float8", "other"])
def test_unknown_kernels_are_refused(name):
    with pytest.raises(KernelError, match="choose anew"):
        make_kernel(name, torch.eye(4))
