"""Any torch optimizer keeps the zeros of a model with masks, and no hook stays where it does not belong."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, Adagrad, AdamW, RMSprop
from torch.optim import optimizer as torch_optimizers
from transformers import Trainer

from hf_prune import MaskStore, drop_masks, keep_sparse, prunable, prune, sparsity_report
from hf_prune.pruning import optimizer_guard
from hf_prune.pruning.held_masks import held_by
from tests import models
from tests.models import mlp, same_bits
from tests.pruning.test_regrown import grown
from tests.training.test_trainer import Sentences, arguments

OPTIMIZERS = {
    "adamw": lambda p: AdamW(p, 0.1, weight_decay=0.1),
    "fused": lambda p: AdamW(p, 0.1, fused=True),
    "momentum": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: RMSprop(p, 0.1),
    "adagrad": lambda p: Adagrad(p, 0.1),
    "adafactor": lambda p: Adafactor(p, 0.1),
}


@pytest.fixture(autouse=True)
def no_hook_stays():
    yield
    gc.collect()
    assert not torch_optimizers._global_optimizer_pre_hooks
    assert not torch_optimizers._global_optimizer_post_hooks


def step(model, *optimizers):
    model(x=torch.ones(2, 8)).logits.square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zeros_stay_and_the_rest_is_trained_as_with_keep_sparse(kind):
    model = mlp()
    optimizer = OPTIMIZERS[kind](model.parameters())
    step(model, optimizer)  # dense, so that the optimizer would go on with removed weights
    prune(model, 0.5)
    twin = copy.deepcopy(model)
    other = OPTIMIZERS[kind](twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    keep_sparse(twin, other)
    for _ in range(3):
        step(model, optimizer)
        step(twin, other)
        assert not grown(model)
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_several_optimizers_and_only_those_that_train_masked_weights():
    model, dense = prune(mlp(), 0.5), mlp()
    first, second = AdamW(model.fc1.parameters(), 0.1), SGD([*model.fc2.parameters(), *dense.fc1.parameters()], 0.1)
    unrelated = AdamW(dense.fc2.parameters(), 0.1)
    step(model, unrelated)  # the gradients still wait for theirs
    first.step()
    second.step()
    assert not grown(model)
    assert not unrelated._optimizer_step_post_hooks
    assert [len(o._optimizer_step_post_hooks) for o in (first, second)] == [1, 1]
    step(model, AdamW(model.parameters(), 0.1))  # another one, while the first are there
    assert not grown(model)
    assert not torch_optimizers._global_optimizer_pre_hooks


def test_gradients_that_are_never_used():
    model = prune(mlp(), 0.5)
    step(model)
    assert torch_optimizers._global_optimizer_pre_hooks
    del model  # the fixture sees that nothing is left


def test_weights_that_were_frozen_and_masks_that_change():
    model = mlp().requires_grad_(False)
    prune(model, 0.5)
    assert not model.fc1.weight.requires_grad
    model.requires_grad_(True)
    optimizer = AdamW(model.parameters(), 0.1)
    step(model, optimizer)
    assert not grown(model)
    prune(model, 0.8)
    step(model, optimizer)
    assert not grown(model)
    zeros = [int((layer.weight == 0).sum()) for layer in (model.fc1, model.fc2)]
    drop_masks(model, "fc1.weight")
    step(model, optimizer)
    assert int((model.fc1.weight == 0).sum()) < zeros[0]
    assert not grown(model)
    MaskStore.detach(model)
    step(model, optimizer)
    assert int((model.fc2.weight == 0).sum()) < zeros[1]
    assert not model.fc1.weight._post_accumulate_grad_hooks


def test_copies_of_models_of_transformers():
    model = prunable(models.tiny_bert()).prune(0.5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        optimizer = AdamW(twin.parameters(), 0.1)
        twin(**models.tiny_batches(twin)[0]).logits.sum().backward()
        optimizer.step()
        assert not grown(twin)


def trained(model, steps=2):
    """Train a model all of whose parameters may be new; its batches are token ids."""
    optimizer = AdamW(model.parameters(), 0.1)
    for _ in range(steps):
        model(**models.tiny_batches(model)[0]).logits.float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def saved_and_loaded(model):
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


def assigned(model):
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return model


def converted(setting, model):
    setting(True)
    try:
        return model.to(torch.bfloat16).to(torch.float32)
    finally:
        setting(False)


NEW_PARAMETERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved_and_loaded,
    "assign": assigned,
    "overwrite": partial(converted, torch.__future__.set_overwrite_module_params_on_conversion),
    "swap": partial(converted, torch.__future__.set_swap_module_params_on_conversion),
    "copy of a copy": lambda m: trained(copy.deepcopy(copy.deepcopy(m))),
}


@pytest.mark.parametrize("how", NEW_PARAMETERS)
def test_plain_models_whose_parameters_are_new(how):
    model = NEW_PARAMETERS[how](prune(models.tiny_llama(), 0.5))
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained(model)
    assert not any(torch.equal(p.detach(), weights[name]) for name, p in model.named_parameters())
    assert not grown(model)
    MaskStore.detach(model)
    assert not any(m._forward_pre_hooks or m._state_dict_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_the_hook_of_a_model_goes_with_masks_that_went_elsewhere():
    model = prune(mlp(), 0.5)
    MaskStore.detach(model.fc1)
    MaskStore.detach(model.fc2)
    assert model._forward_pre_hooks
    step(model)
    assert not model._forward_pre_hooks


def test_parameters_that_are_replaced_for_one_call_and_compiled_models():
    model, inputs = prune(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 3)), 0.5), torch.ones(2, 8)
    expected = model(inputs)
    weights = {name: parameter.detach() * 1 for name, parameter in model.named_parameters()}
    torch.func.grad(lambda w: torch.func.functional_call(model, w, (inputs,)).sum())(weights)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(inputs), expected)
    optimizer = AdamW(model.parameters(), 0.1)
    compiled(inputs).sum().backward()
    optimizer.step()
    assert not grown(model)


def test_nothing_piles_up_over_steps():
    model = prune(mlp(), 0.5)
    optimizer = AdamW(model.parameters(), 0.1)
    sizes = []
    for _ in range(4):
        step(model, optimizer)
        sizes.append((len(weakref.finalize._registry), weakref.getweakrefcount(held_by(model.fc1))))
    assert len(set(sizes)) == 1
    assert not optimizer_guard._waiting


def test_a_plain_trainer(tmp_path):
    model = prune(models.tiny_bert(), 0.5)
    before = {name: mask.clone() for name, mask in MaskStore.of(model).masks.items()}
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=3), train_dataset=Sentences())
    weight = model.get_parameter(next(iter(before))).detach().clone()
    trainer.train()
    assert not same_bits(weight, model.get_parameter(next(iter(before))).detach())
    assert not grown(model)
    assert all(torch.equal(mask, before[name]) for name, mask in MaskStore.of(model).masks.items())


@pytest.mark.parametrize("look", ["report", "save", "state dict of a plain model"])
def test_that_masks_were_applied_unasked_is_said_once(look, tmp_path):
    model = prune(models.tiny_bert(), 0.5) if "plain" in look else prunable(models.tiny_bert()).prune(0.5)
    looks = {
        "report": lambda: sparsity_report(model),
        "save": lambda: model.save_pretrained(tmp_path),
        "state dict of a plain model": model.state_dict,
    }
    batch = models.tiny_batches(model)[0]
    optimizer = AdamW(model.parameters(), 0.1)
    model(**batch).loss.backward()
    optimizer.step()
    assert grown(model) == 0
    with pytest.warns(UserWarning, match="AdamW trained weights with masks, and the masks were applied after each"):
        looks[look]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        looks[look]()
        keep_sparse(model, optimizer)  # which asks for it
        model(**batch).loss.backward()
        optimizer.step()
        looks[look]()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
def test_a_state_dict_with_weights_that_grew_back_says_so(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    model = prune(models.tiny_bert(), 0.5)
    model.state_dict()  # warnings are errors
    settings = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    merged = peft.get_peft_model(model, settings).merge_and_unload()
    with pytest.warns(UserWarning, match=r"^[\d,]+ of the .* not zero any more.*the state dict holds them.*merge_lora"):
        merged.save_pretrained(tmp_path)
    MaskStore.of(merged).apply(merged)
    merged.save_pretrained(tmp_path)
