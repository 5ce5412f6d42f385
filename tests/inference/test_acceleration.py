"""accelerate(): the right kernels, the same answers, and the plain model back."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from hf_prune import accelerate, decelerate, measure_latency, prunable, prune, shrink, sparsity_report
from hf_prune.errors import CheckpointError, ConfigError, DataError, KernelError, PlanError
from hf_prune.inference.acceleration import accelerate as module
from hf_prune.inference.acceleration import choose, dense_kernels, install, kernels, layers
from hf_prune.inference.acceleration.choose import Choice, limits
from hf_prune.inference.acceleration.dense_kernels import Compact, Dense, OneDNN, onednn_agrees
from hf_prune.inference.acceleration.kernels import Lower, candidates, is_kernel, make_kernel, zeros_of
from hf_prune.inference.acceleration.layers import Accelerated, Ranges, is_accelerated, switch_on
from hf_prune.inference.acceleration.observe import difference_to
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.inference.acceleration.sparse_kernels import Csr, Sparse
from hf_prune.inference.subnormals import has_subnormals
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


def pruned_linear(inputs, outputs, sparsity):
    torch.manual_seed(0)
    return prune(nn.Linear(inputs, outputs), sparsity).eval()


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_every_kernel_computes_the_layer():
    torch.manual_seed(0)
    weight = torch.randn(48, 600) * (torch.rand(3, 1, 600) > 0.7).expand(3, 16, 600).reshape(48, 600)
    weight[:, :60] = 0
    assert zeros_of(weight) == (True, True)
    for bias in (None, torch.randn(48)):
        for shape in ((600,), (5, 600), (2, 3, 600)):
            x = torch.randn(shape)
            expected = torch.nn.functional.linear(x, weight, bias)
            names = []
            for name in candidates(weight, ["bfloat16", "float16", "int8"]):
                kernel = make_kernel(name, weight)
                names.append(name)
                assert kernel.name == name
                close = 1e-4 if name.rpartition(":")[2] not in ("bfloat16", "float16", "int8") else 0.05
                torch.testing.assert_close(kernel(x, weight, bias), expected, atol=10 * close, rtol=close)
                if (whole := kernel.to_dense()) is not None:
                    assert torch.equal(whole, weight)
                assert kernel.nbytes > 0 or kernel.reads_weight
    formats = ["sparse:192", "sparse:384", "sparse:65536", "sliced", "bits", "blocks"]
    assert names == [
        "dense", "onednn", "compact:dense", "compact:onednn", *formats, "csr",
        *(f"{name}:{dtype}" for dtype in ("bfloat16", "float16") for name in ("dense", *formats)), "dense:int8",
    ]  # fmt: skip


def test_what_the_zeros_do_not_suit_is_no_candidate():
    scattered = torch.randn(32, 64) * (torch.rand(32, 64) > 0.8)
    assert zeros_of(scattered) == (False, False)
    assert not {"blocks", "compact:dense"} & {*candidates(scattered, [])}
    assert candidates(torch.randn(32, 64), []) == ["dense", "onednn"]
    assert zeros_of(torch.zeros(4, 4)) == (False, True)
    rows = torch.randn(32, 64)
    rows[::2] = 0
    assert "compact:dense" in candidates(rows, [])


@torch.no_grad()
def test_rows_and_columns_of_zeros_are_left_out():
    weight = torch.randn(6, 8)
    weight[[0, 4]] = 0
    weight[:, [1, 2]] = 0
    kernel = Compact(weight, Dense())
    assert kernel.weight.shape == (4, 6)
    x = torch.full((3, 8), float("inf"))
    x[:, [0, 3, 4, 5, 6, 7]] = torch.randn(3, 6)
    assert kernel(x, None, torch.ones(6)).isfinite().all()  # as sparse kernels do, it passes over zeros
    assert kernel(x, None, torch.ones(6))[:, [0, 4]].eq(1).all()


def test_onednn_must_agree(monkeypatch):
    monkeypatch.setattr(dense_kernels, "_AGREES", 0.0)
    onednn_agrees.cache_clear()
    try:
        assert "onednn" not in candidates(torch.ones(4, 4), [])
        with pytest.raises(KernelError, match="no exact oneDNN"):
            make_kernel("onednn", torch.ones(4, 4))
    finally:
        onednn_agrees.cache_clear()


def test_the_kernel_is_chosen_by_the_number_of_tokens():
    weight = torch.eye(8)
    dense, sparse = Dense(), Sparse(weight, "sparse:8")
    ranges = Ranges((2, 32), (dense, sparse, OneDNN()))
    assert [ranges.kernel_for(n).name for n in (1, 2, 3, 32, 33, 10_000)] == [
        "dense", "dense", "sparse:8", "sparse:8", "onednn", "onednn",
    ]  # fmt: skip
    assert limits((1, 4, 64)) == (2, 16)
    assert torch.equal(ranges.exact(), weight)
    assert ranges.reads_weight


def test_noise_is_no_gain(monkeypatch):
    wall = {"dense": (1.0, 2.0) * 6, "onednn": (2.0, 1.0) * 6}  # sometimes faster, sometimes slower

    def timed(runs, **_):
        return {name: Timings(wall[name], wall[name]) for name in runs}

    monkeypatch.setattr(choose, "time_together", timed)
    assert [c.kernel for c in choose.choose(torch.ones(4, 4), None, [1, 8], [], 1e-4)] == ["dense", "dense"]


@pytest.mark.parametrize("tolerance", [1e-4, 0.1])
def test_the_kernels_of_a_layer_are_within_the_tolerance(tolerance, monkeypatch):
    def timed(runs, **_):
        return {name: Timings(*[(1.0 if name == "dense:int8" else 2.0,) * 9] * 2) for name in runs}

    monkeypatch.setattr(choose, "time_together", timed)
    torch.manual_seed(0)
    found = choose.choose(torch.randn(16, 32), None, [1, 8], ["int8"], tolerance)
    assert [c.kernel for c in found] == ["dense" if tolerance < 0.01 else "dense:int8"] * 2


def test_saved_kernels_are_within_the_tolerance_for_every_number_of_tokens(quick, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16)).eval()
    model.forward = lambda x: model[0](x)  # takes its input by name
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(16, 32) > 0.8)
    x = torch.randn(64, 32)
    path = tmp_path / "kernels.json"
    report = accelerate(model, {"x": x})
    assert report.speedup is not None
    report.save(path)
    decelerate(model)
    saved = json.loads(path.read_text())
    for choice in saved["kinds"][0]["choices"][:2]:  # for few tokens, that the batch has not
        choice["kernel"] = "dense:int8"
    path.write_text(json.dumps(saved))
    before = model(x[:1])
    report = accelerate(model, {"x": x}, saved=path, dtypes=["int8"])
    assert [choice.kernel for choice in report.kinds[0].choices[:2]] == ["dense", "dense"]
    assert "keep torch's default for 1, 4 tokens: dense:int8 would change an output" in str(report)
    torch.testing.assert_close(model(x[:1]), before)
    assert f"take {report.bytes_after - report.bytes_before} B more memory than before" in str(report)
    decelerate(model)
    accelerate(model, {"x": x}, saved=path, dtypes=["int8"], tolerance=0.1)
    assert model[0].ranges.kernel_for(1).name == "dense:int8"


@pytest.mark.parametrize(
    ("kept", "sliced", "expected"),
    [
        (0.1, 1.0, ["sliced", "sparse:65536"]),  # both take less than the dense weight
        (0.6, 1.0, ["sparse:65536"]),
        (0.1, 2.0, ["sparse:65536"]),  # as fast as the other
    ],
)
def test_a_second_format_is_worth_its_memory(kept, sliced, expected, monkeypatch):
    def seconds(name, tokens):
        return {"sparse:65536": 2.0, "sliced": sliced if tokens == 1 else 4.0}.get(name, 8.0)

    def timed(runs, **_):
        return {n: Timings(*[(seconds(n, len(run.args[0])),) * 9] * 2) for n, run in runs.items()}

    monkeypatch.setattr(choose, "time_together", timed)
    torch.manual_seed(0)
    weight = torch.randn(64, 256).where(torch.rand(64, 256) < kept, 0.0)
    found = choose.choose(weight, None, [1, 16, 64], [], 1e-4)
    assert sorted({choice.kernel for choice in found}) == expected
    weight[weight == 0] = -0.0  # which no format has, so that the dense weight stays
    found = choose.choose(weight, None, [1, 16, 64], [], 1e-4)
    assert {choice.kernel for choice in found} == {"sparse:65536"}


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


def test_it_is_timed_beside_the_plain_model(quick):
    model = bert()
    plain = copy.deepcopy(model)
    model.accelerate(INPUTS)
    assert model.bert.encoder.layer[0].attention.self.query.weight.is_meta
    timed = measure_latency({"plain": plain, "accelerated": model}, batch_sizes=[1], lengths=[6], rounds=3)
    assert [point.model for point in timed.points] == ["plain", "accelerated"]
    assert timed.device == "cpu"


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


def test_bfloat16_models_and_lower_precision(quick, monkeypatch):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=48, vocab_size=50,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = prunable(LlamaForCausalLM(config)).eval().prune(0.7)
    report = model.accelerate(INPUTS, dtypes=["bfloat16"], tolerance=1e-9)
    assert "No layer computes in bfloat16: none is faster in it within tolerance=1e-09." in str(report)
    model.decelerate()  # of some layers an output is the same to the bit
    with monkeypatch.context() as patched:  # layers that are exact enough, in a model that is not
        for place in (choose, install):
            patched.setattr(place, "change_of", lambda *_: 0.0)
        with pytest.raises(KernelError, match="tolerance"):
            model.accelerate(INPUTS, dtypes=["bfloat16"], tolerance=1e-9)
    assert not is_accelerated(model)
    half = copy.deepcopy(model).bfloat16()
    outputs = half(**INPUTS).logits
    half.accelerate(INPUTS)
    torch.testing.assert_close(half(**INPUTS).logits, outputs, atol=0.05, rtol=0.1)
    lower = Lower(torch.eye(4), torch.bfloat16, "dense")
    assert lower.nbytes == 32
    with pytest.raises(ConfigError, match="bfloat16"):
        model.accelerate(INPUTS, dtypes=["float8"])


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 1e-4), ("float16", 2**-9), ("bfloat16", 2**-6)])
def test_the_tolerance_is_twice_the_rounding_of_the_precision(dtype, expected):
    model = pruned_linear(256, 384, sparsity=0.8).to(getattr(torch, dtype))
    report = accelerate(model, {"input": torch.randn(32, 256).to(getattr(torch, dtype))})
    assert report.tolerance == expected


def test_without_a_compiler_nobody_is_told_that_no_layer_gains(monkeypatch):
    def missing() -> str:
        return "there is no C++ compiler"

    for place in (kernels, module):
        monkeypatch.setattr(place, "kernel_problem", missing)
    report = accelerate(pruned_linear(256, 384, sparsity=0.8), {"input": torch.randn(32, 256)})
    said = "could not be used, and were not timed: there is no C++ compiler."
    assert said in str(report)
    assert "could not be used: there is no C++ compiler." in report.sentence
    assert AccelerationReport.from_dict(report.to_dict()) == report
    with pytest.raises(DataError, match="without_sparse is"):
        AccelerationReport.from_dict({**report.to_dict(), "without_sparse": "x" * 2000})
    dense = accelerate(nn.Linear(256, 384), {"input": torch.randn(32, 256)})
    assert not dense.without_sparse  # which sparse kernels could not have helped


def test_int8_keeps_what_is_no_number():
    layer = nn.Linear(64, 48)
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    x[2, 7] = float("inf")
    found = make_kernel("dense:int8", layer.weight)(x, None, layer.bias)
    assert found[0].isfinite().all()
    assert found[1:].isnan().all()


def test_a_training_in_eval_mode_is_refused(quick):
    """Also where the inputs of the accelerated layer need no gradient."""
    model = nn.Sequential(OrderedDict(a=pruned_linear(768, 3072, sparsity=0.9), norm=nn.LayerNorm(3072))).eval()
    inputs = {"input": torch.randn(32, 768)}
    accelerate(model, inputs)
    assert is_accelerated(model)
    with pytest.raises(KernelError, match=r"call decelerate\(\) before training it"):
        model(**inputs).sum().backward()
    for parameter in model.a.parameters():
        parameter.requires_grad_(False)
    model(**inputs).sum().backward()  # what is trained comes after it
    assert model.norm.weight.grad is not None


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
    with pytest.raises(KernelError, match=r"another model: it has a layer .* of shape .*, and here there is none"):
        model.accelerate(INPUTS, saved=path)
    assert not is_accelerated(model)


@pytest.fixture
def choice(quick, tmp_path):
    """A model, and a choice of kernels for it in a file."""
    model = bert()
    model.accelerate(INPUTS).save(tmp_path / "choice.json")
    return model.decelerate(), tmp_path / "choice.json"


def edit(path, *, machine=(), **kind):
    """Write other values into a saved choice, of its machine and of its first kind of layer."""
    saved = json.loads(path.read_text())
    saved["machine"].update(machine)
    saved["kinds"][0].update(kind)
    path.write_text(json.dumps(saved))


RISING = [{"tokens": n, "kernel": "dense", "dense_seconds": 1, "seconds": 1, "ratio": 1} for n in (1, 4)]


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"layers": 3}, "TypeError"),
        ({"choices": []}, r"choices for \[\] tokens"),
        ({"choices": RISING[::-1]}, r"choices for \[4, 1\] tokens, expected rising numbers from 1"),
        ({"choices": [{**RISING[0], "tokens": 10**400}]}, "expected rising numbers from 1 to 16777216"),
        ({"choices": [{**RISING[0], "tokens": math.inf}]}, "OverflowError"),
        ({"shape": [384]}, r"shape is \[384\], expected two numbers"),
        ({"shape": [32, 32, 1]}, r"shape is \[32, 32, 1\], expected two numbers"),
        ({"shape": [math.inf, 1]}, "OverflowError"),
        ({"sparsity": None}, "TypeError"),
    ],
)
def test_a_damaged_choice_is_refused(choice, changed, found):
    model, path = choice
    edit(path, **changed)
    with pytest.raises(CheckpointError, match=rf"choice.json is not a record of an acceleration \(.*{found}"):
        model.accelerate(INPUTS, saved=path)
    assert not is_accelerated(model)


def test_what_is_no_choice_is_refused(choice):
    model, path = choice
    for text, found in (("[]", "holds a JSON list"), ("{}", "KeyError: 'format'"), ("no", "not valid JSON")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=found):
            model.accelerate(INPUTS, saved=path)
    with pytest.raises(CheckpointError, match=rf"^{path.parent} is a folder: expected a JSON file"):
        model.accelerate(INPUTS, saved=path.parent)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"choice.json is missing: expected what AccelerationReport.save\(\) or"):
        model.accelerate(INPUTS, saved=path)


@pytest.mark.parametrize(
    "name", ["sparse:²", "sparse:٣", "sparse:99999999999", "onednn:float16", "csr:float16", "compact:dense:float16",
             "dense:float32", "dense:float16:float16", "x", ""],
)  # fmt: skip
def test_a_choice_of_a_kernel_that_is_never_offered_is_refused(choice, name):
    model, path = choice
    edit(path, choices=[{**RISING[0], "kernel": name}])
    with pytest.raises(KernelError, match=r"choice.json chose '.*', and float32 has no such kernel: leave saved out"):
        model.accelerate(INPUTS, saved=path, dtypes=["float16", "float32"])
    with pytest.raises(KernelError, match=r"there is no kernel '.*' for float32: choose anew"):
        make_kernel(name, torch.eye(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_choice_may_name_every_kernel_that_is_offered(dtype):
    weight = torch.eye(600).to(dtype)
    weight[:, 64:] = 0
    names = candidates(weight, ["float32", "bfloat16", "float16", "int8"])
    assert {"compact:dense", "sparse:384", "sliced", "bits", "dense:int8"} <= {*names}
    assert all(is_kernel(name, str(dtype).removeprefix("torch.")) for name in names)


def test_a_choice_of_a_precision_that_is_not_allowed_is_refused(choice):
    model, path = choice
    edit(path, choices=[{**RISING[0], "kernel": "dense:float16"}])
    with pytest.raises(KernelError, match="chose dense:float16: allow it with dtypes, or leave saved out"):
        model.accelerate(INPUTS, saved=path)


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (lambda: bert(0), r"in float32 with 80 % zeros, and here it is .* in float32 with 0 %; leave saved out"),
        (lambda: bert(0.9), "with 80 % zeros, and here it is .* with 90 %"),
        (lambda: bert().bfloat16(), "in float32 .*, and here it is .* in bfloat16 with 80 %"),
    ],
)
def test_a_choice_of_another_checkpoint_is_refused(choice, other, found):
    _, path = choice
    model = other()
    with pytest.raises(KernelError, match=rf"choice.json is for another model: its layer .* {found}"):
        accelerate(model, INPUTS, saved=path)
    assert not is_accelerated(model)


def test_the_report_of_a_choice_says_what_is_counted_here(choice):
    model, path = choice
    first = json.loads(path.read_text())["kinds"][0]
    with torch.no_grad():  # one layer is one step apart
        module_of = dict(model.named_modules())
        weight = module_of[first["layers"][0]].weight
        weight.view(-1)[: round(0.85 * weight.numel())] = 0
        weight.view(-1)[round(0.85 * weight.numel()) :] = 1
    report = model.accelerate(INPUTS, saved=path)
    counted = {name: kind.sparsity for kind in report.kinds for name in kind.layers}
    assert [counted[name] for name in first["layers"]] == [0.85, *[0.8] * (len(first["layers"]) - 1)]
    model.decelerate()
    edit(path, sparsity=math.nan)
    with pytest.raises(KernelError, match="another model"):
        model.accelerate(INPUTS, saved=path)


def test_a_choice_for_other_threads_says_how_to_have_them(choice):
    model, path = choice
    edit(path, machine={"threads": "77"})
    with pytest.raises(KernelError, match=r"for threads 77, and .*: call torch.set_num_threads\(77\) first, or leave"):
        model.accelerate(INPUTS, saved=path)
    for machine in ({"threads": "77", "cpu": "another"}, {"threads": "7²"}):
        edit(path, machine=machine)
        with pytest.raises(KernelError, match=r"and this is [^:]*: leave saved out, to choose for this machine"):
            model.accelerate(INPUTS, saved=path)


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 1}, {"seq_length": 8}, {"threads": 1}, {"batch_size": 0}, {"length": -3}, {"length": 3.5},
     {"length": True}, [("length", 8)], "long", 8],
)  # fmt: skip
def test_what_is_no_workload_is_refused(wrong):
    message = "workload is .*: expected whole numbers from 1 on of batch_size, length, such as {'batch_size': 1"
    with pytest.raises(ConfigError, match=message):
        bert(0).accelerate(workload=wrong)
    if wrong != {"threads": 1}:
        with pytest.raises(ConfigError, match="of batch_size, length, threads, such as"):
            module.measure_acceleration(bert(0), wrong)


def test_a_generation_is_no_workload():
    with pytest.raises(ConfigError, match=r"one forward pass is timed, and measure_latency\(new_tokens=...\) times"):
        bert(0).accelerate(workload={"prompt": 8, "new_tokens": 8})


def test_inputs_have_a_size_of_their_own(quick):
    model = bert()
    with pytest.raises(ConfigError, match=r"workload is {'length': 8} beside inputs, .*: leave one of them out"):
        model.accelerate(INPUTS, workload={"length": 8})
    assert model.accelerate(INPUTS, workload={}).length == 6


def test_no_layer_gains_is_an_answer(monkeypatch):
    model = bert(sparsity=0)
    monkeypatch.setattr(
        module, "choose", lambda weight, bias, tokens, dtypes, tolerance: [Choice(1, "dense", 1.0, 1.0, 1.0)]
    )
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


def test_subnormal_numbers_of_float16_are_normal_in_float32():
    small = torch.full((2, 4), 1e-6, dtype=torch.float16)
    assert not has_subnormals(small)
    assert has_subnormals(torch.full((2, 4), 1e-39, dtype=torch.bfloat16))
    assert has_subnormals(torch.full((2, 4), 1e-39))


def test_csr_does_not_warn():
    assert Csr(torch.eye(3))(torch.ones(2, 3), None, None).tolist() == [[1.0] * 3] * 2


def test_loading_other_weights_ends_it(quick):
    model, other = bert(), bert(0.9)
    model.accelerate(INPUTS)
    with pytest.warns(UserWarning, match="other weights were loaded"):
        model.load_state_dict(other.state_dict())
    assert not is_accelerated(model)
    assert same(weights(model), weights(other))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_writing_to_a_weight_is_noticed(kept, change, quick):
    model = bert()
    model.accelerate(INPUTS)
    layer = next(m for m in model.modules() if isinstance(m, Accelerated) and m.weight.is_meta)
    weight = layer.dense_weight()
    if kept:
        layer._parameters["weight"] = torch.nn.Parameter(weight.clone())
        layers._watch(layer)
    assert torch.equal(copy.deepcopy(model)(**INPUTS).logits, model(**INPUTS).logits)
    if change == "replaced":
        layer.weight = torch.nn.Parameter(2 * weight)
    else:
        with torch.no_grad():
            layer.weight.mul_(2)
    if not kept and change == "in place":
        with pytest.raises(KernelError, match=r"so the new values are lost: call decelerate\(\)"):
            model(**INPUTS)
        model.decelerate()
        assert torch.equal(layer.weight, weight)
        return
    with pytest.warns(UserWarning, match="since a weight was written to"):
        answered = model(**INPUTS).logits
    assert type(layer) is torch.nn.Linear
    assert torch.equal(layer.weight, 2 * weight)
    model.decelerate()
    assert torch.allclose(model(**INPUTS).logits, answered, atol=1e-5)


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
