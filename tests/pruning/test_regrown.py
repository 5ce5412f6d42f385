"""Zeros that a plain training fills again: whoever looks says so, and keep_sparse() prevents it."""

import copy
import warnings
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import LBFGS, SGD, AdamW

from hf_prune import (
    ConfigError,
    ExportError,
    MaskError,
    MaskStore,
    evaluate_classification,
    evaluate_perplexity,
    export_model,
    keep_sparse,
    measure_latency,
    prunable,
    prune,
    shrink,
    sparsity_report,
    structure_report,
)
from hf_prune.conversion import export
from tests import models
from tests.models import mlp, same_bits, snapshot

WRAPPERS = [nn.DataParallel, partial(torch.compile, backend="eager"), lambda model: nn.ModuleDict({"inner": model})]
OPTIMIZERS = {
    "adamw": lambda p: AdamW(p, 0.1, foreach=False),
    "foreach": lambda p: AdamW(p, 0.1, foreach=True),
    "fused": lambda p: AdamW(p, 0.1, fused=True),
    "momentum": lambda p: SGD(p, 0.1, momentum=0.9),
    "lbfgs": lambda p: LBFGS(p, 0.1, max_iter=4),  # several steps with a closure in one
}


def train(model, optimizer, steps=2):
    """A plain training loop that knows nothing of masks."""

    def loss():
        optimizer.zero_grad()
        total = model(x=torch.ones(2, 8)).logits.square().sum()
        total.backward()
        return total

    for _ in range(steps):
        optimizer.step(loss)


def grown(model):
    """How many removed weights are not zero."""
    return sum(int((model.get_parameter(n) != 0)[~mask].sum()) for n, mask in MaskStore.of(model).masks.items())


def refilled(model, number=3):
    """The model, with so many of the weights that its first mask removes filled again."""
    name, mask = next(iter(MaskStore.of(model).masks.items()))
    with torch.no_grad():
        model.get_parameter(name).view(-1)[(~mask).view(-1).nonzero()[:number]] = 1e-3
    return model


# --- what is said -----------------------------------------------------------------------------------------


def exported(model, folder):
    with pytest.raises(ExportError, match="it has looked by then"):
        export_model(model, folder / "model.onnx")


def look_at(model, how, folder):
    """One of the things that people do with a model."""
    rows = Dataset.from_dict(models.tiny_sentences(4))
    {
        "save": lambda: model.save_pretrained(folder),
        "compress": lambda: model.save_pretrained(folder, compressed=True),
        "report": model.sparsity_report,
        "structure": lambda: structure_report(model),
        "accuracy": lambda: evaluate_classification(model, models.tiny_tokenizer(), rows),
        "perplexity": lambda: evaluate_perplexity(model, models.tiny_tokenizer(), ["w1 w2 " * 20], window=8),
        "time": lambda: measure_latency({"m": model}, lengths=[4], rounds=2, warmup=0),
        "export": lambda: exported(model, folder),
        "prune": lambda: model.prune(0.6),
        "units": lambda: model.prune(0.6, granularity=("head", "neuron")),
        "permanent": model.make_permanent,
        "shrink": lambda: shrink(model),
    }[how]()


@pytest.mark.parametrize(
    ("how", "consequence"),
    [
        ("save", "they are zero in the saved model, which is not the model that was trained or evaluated"),
        ("compress", "they are zero in the saved model, which is not the model that was trained or evaluated"),
        ("report", "they are counted as they are"),
        ("structure", r"where a whole unit was removed, shrink\(\) would not take it out"),
        ("accuracy", r"what is scored is not the model that save_pretrained\(\) writes"),
        ("perplexity", r"what is scored is not the model that save_pretrained\(\) writes"),
        ("time", r"what is timed is not the model that save_pretrained\(\) writes"),
        ("export", r"the exported model is not the one that save_pretrained\(\) writes"),
        ("prune", "they become zero now"),
        ("units", "they become zero now"),
        ("permanent", "they become zero now"),
        ("shrink", "the heads, neurons and channels that they belong to stay"),
    ],
)
def test_whoever_looks_says_how_many_grew_back_and_what_to_do(how, consequence, tmp_path, monkeypatch):
    def stop(*_):
        raise ExportError("it has looked by then")

    monkeypatch.setattr(export, "_program", stop)  # which takes seconds
    model = models.tiny_llama() if how == "perplexity" else models.tiny_classifier()
    model = prunable(model).prune(0.5)
    removed = sum(int((~mask).sum()) for mask in model.masks.values())
    look_at(copy.deepcopy(model), how, tmp_path)  # warnings are errors: nothing is said of a model that was left alone
    count = rf"3 of the {removed:,} weights that the masks remove \({300 / removed:.2f} %\) are not zero any more"
    advice = r"apply_masks\(\) sets them to zero again; keep_sparse\(optimizer\) before a training"
    with pytest.warns(UserWarning, match=f"^{count}.*: {consequence}.*{advice}"):
        look_at(refilled(model), how, tmp_path)


def test_the_report_counts_what_grew_back_and_saving_does_not_keep_it(tmp_path):
    model = refilled(prunable(models.tiny_bert()).prune(0.5), 7)
    removed = sum(int((~mask).sum()) for mask in model.masks.values())
    with pytest.warns(UserWarning, match="7 of the"):
        assert model.sparsity_report().removed == removed - 7
    with pytest.warns(UserWarning, match="7 of the"):
        model.save_pretrained(tmp_path)
    assert model.sparsity_report().removed == removed


def test_a_weight_that_is_not_a_number_counts_and_a_kept_zero_does_not():
    model = prune(mlp(), 0.5)
    with torch.no_grad():
        mask = MaskStore.of(model).masks["fc1.weight"]
        model.fc1.weight[mask] = 0
    sparsity_report(model)
    refilled(model, 2).fc1.weight.data.masked_fill_(model.fc1.weight != 0, float("nan"))
    with pytest.warns(UserWarning, match=r"^2 of the"):
        sparsity_report(model)


# --- what prevents it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_that_keeps_sparse_trains_the_rest_as_usual(kind):
    model = prune(mlp(), 0.5)
    plain, before = copy.deepcopy(model), snapshot(model)
    train(plain, OPTIMIZERS[kind](plain.parameters()), 1)
    assert grown(plain)
    optimizer = OPTIMIZERS[kind](model.parameters())
    handle = keep_sparse(model, optimizer)
    train(model, optimizer, 1)
    assert not grown(model)
    for name, mask in MaskStore.of(model).masks.items():
        weight, other = model.get_parameter(name).detach(), plain.get_parameter(name).detach()
        assert not same_bits(weight, before[name])
        if kind != "lbfgs":  # the others look at each weight alone
            assert same_bits(weight[mask], other[mask])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsity_report(model)
    handle.remove()
    assert not optimizer._optimizer_step_post_hooks or kind != "lbfgs"


def test_the_masks_are_those_of_each_step():
    model = prune(mlp(), 0.5)
    optimizer = AdamW(model.parameters(), 0.1)
    keep_sparse(model, optimizer)
    train(model, optimizer)
    prune(model, 0.8)
    train(model, optimizer)
    assert not grown(model)
    assert sparsity_report(model).target_sparsity == pytest.approx(0.8, abs=0.02)
    MaskStore.of(model).make_permanent(model)
    before = snapshot(model)
    train(model, optimizer)
    assert int((model.fc1.weight == 0).sum()) < int((before["fc1.weight"] == 0).sum())  # nothing is kept any more


def test_optimizers_that_accelerate_wraps_and_scaled_losses():
    accelerator = Accelerator(cpu=True)
    model = prune(mlp(), 0.5)
    optimizer = accelerator.prepare(AdamW(model.parameters(), 0.1))
    handle = keep_sparse(model, optimizer)
    train(model, optimizer)
    assert not grown(model)
    handle.remove()
    keep_sparse(model, optimizer.optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(x=torch.ones(2, 8)).logits.sum()).backward()
    scaler.step(optimizer.optimizer)
    assert not grown(model)


def test_weights_that_fsdp_spreads_over_processes():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = prune(mlp(), 0.5)
        optimizer = AdamW(model.parameters(), 0.1)
        keep_sparse(model, optimizer)
        train(model, optimizer)
        for layer in (model.fc1, model.fc2):
            fully_shard(layer)  # after the hook, which has seen other parameters by then
        optimizer.param_groups[0]["params"] = list(model.parameters())
        train(model, optimizer)
        for name, mask in MaskStore.of(model).masks.items():
            assert not model.get_parameter(name).full_tensor()[~mask].any()
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_whatever_lies_around_the_model(wrap):
    model = prune(mlp(), 0.5)
    wrapper = wrap(model)
    optimizer = AdamW(wrapper.parameters(), 0.1)
    handle = keep_sparse(wrapper, optimizer)
    train(model, optimizer)
    assert not grown(model)
    handle.remove()
    with pytest.warns(UserWarning, match=r"^3 of the"):
        sparsity_report(wrap(refilled(model)))


def test_what_cannot_be_kept_is_refused():
    model = mlp()
    optimizer = AdamW(model.parameters(), 0.1)
    with pytest.raises(MaskError, match="this MLP has no masks, so there is nothing to keep at zero"):
        keep_sparse(model, optimizer)
    prune(model, 0.5)
    with pytest.raises(ConfigError, match=r"found a list: expected a torch\.optim\.Optimizer"):
        keep_sparse(model, [optimizer])
    with pytest.raises(ConfigError, match=r"found a StepLR: expected a torch\.optim\.Optimizer"):
        keep_sparse(model, torch.optim.lr_scheduler.StepLR(optimizer, 1))
    for others in (mlp().parameters(), [model.fc1.bias]):
        with pytest.raises(ConfigError, match="this AdamW holds none of the 2 weights with masks of this MLP"):
            keep_sparse(model, AdamW(others, 0.1))
    assert not optimizer._optimizer_step_post_hooks


def test_the_method():
    model = prunable(models.tiny_bert()).prune(0.5)
    optimizer = AdamW(model.parameters(), 0.1)
    before = {name: mask.clone() for name, mask in model.masks.items()}
    model.keep_sparse(optimizer)
    model(**models.tiny_batches(model)[0]).logits.sum().backward()
    optimizer.step()
    assert not grown(model)
    assert all(torch.equal(mask, before[name]) for name, mask in model.masks.items())
