"""The mask store: exact zeros, kept bits, and a model that never notices."""

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_prune.errors import MaskError, UnknownNameError
from hf_prune.kernels import zeroing as zeroing_module
from hf_prune.kernels.zeroing import zero_removed_
from hf_prune.pipeline import prune
from hf_prune.pruning.mask_store import MaskStore, drop_masks
from tests.models import assert_unchanged, mlp, same_bits, snapshot, tiny_albert

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SPECIAL = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.5, -2.0, 1e-7, -1e-40]


def awkward(dtype: torch.dtype, size: int = 90) -> Tensor:
    """Every kind of value, in every position relative to a mask of any period."""
    return torch.tensor(SPECIAL * (size // len(SPECIAL)), dtype=dtype)


def checked(weight: Tensor, keep: Tensor) -> None:
    before = weight.clone()
    keep_before = keep.clone()
    zero_removed_(weight, keep)
    assert same_bits(weight[~keep], torch.zeros(int((~keep).sum()), dtype=weight.dtype))  # +0.0, not -0.0
    assert same_bits(weight[keep], before[keep])
    assert torch.equal(keep, keep_before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("every", [1, 2, 5, 90])
def test_removed_weights_become_plus_zero_and_kept_ones_keep_every_bit(dtype, every):
    keep = torch.arange(90) % every != 0
    checked(awkward(dtype), keep)
    checked(awkward(dtype), ~keep)
    checked(awkward(dtype).view(9, 10), keep.view(9, 10))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_masks_that_are_not_contiguous(dtype):
    keep = (torch.arange(90) % 4 != 0).view(9, 10)
    checked(awkward(dtype).view(9, 10).t(), keep.view(10, 9))
    checked(awkward(dtype).view(9, 10), keep.view(10, 9).t())
    wide = awkward(dtype, 180).view(9, 20)
    rest = wide[:, 10:].clone()
    checked(wide[:, :10], keep)
    assert same_bits(wide[:, 10:], rest)


def test_more_than_one_chunk(monkeypatch):
    monkeypatch.setattr(zeroing_module, "_CHUNK", 7)
    keep = torch.arange(90) % 3 != 0
    checked(awkward(torch.float32), keep)


def test_nothing_kept_everything_kept_and_nothing_there():
    checked(awkward(torch.float32), torch.zeros(90, dtype=torch.bool))
    checked(awkward(torch.float32), torch.ones(90, dtype=torch.bool))
    checked(torch.empty(0), torch.empty(0, dtype=torch.bool))


def test_a_parameter_that_needs_a_gradient_is_zeroed_without_a_graph():
    weight = nn.Parameter(torch.ones(4))
    zero_removed_(weight, torch.tensor([True, False, True, False]))
    assert weight.tolist() == [1, 0, 1, 0]
    assert weight.requires_grad
    assert weight.grad_fn is None


def test_the_store_is_no_part_of_the_module():
    model = mlp()
    keys, modules = list(model.state_dict()), list(model.modules())
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert MaskStore.of(model) is None
    prune(model, 0.5)
    assert list(MaskStore.of(model).masks) == ["fc1.weight", "fc2.weight"]
    assert list(model.state_dict()) == keys
    assert list(model.modules()) == modules
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert dict(model.named_buffers()) == buffers


def test_apply_after_something_wrote_to_the_weights():
    model = prune(mlp(), 0.5)
    masks = MaskStore.of(model).masks
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    stepped = snapshot(model)
    assert all(bool(stepped[name][~mask].any()) for name, mask in masks.items())
    MaskStore.of(model).apply(model)
    for name, parameter in model.named_parameters():
        mask = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert same_bits(parameter[mask], stepped[name][mask])
        assert not parameter[~mask].any()


def test_apply_overwrites_nan():
    model = prune(mlp(), 0.5)
    mask = MaskStore.of(model).masks["fc1.weight"]
    with torch.no_grad():
        model.fc1.weight[~mask] = float("nan")
    MaskStore.of(model).apply(model)
    assert same_bits(model.fc1.weight[~mask], torch.zeros(48))


def test_a_copy_has_masks_of_its_own():
    model = prune(mlp(), 0.3, keep_dense=True)
    clone = copy.deepcopy(model)
    before = snapshot(model)
    masks = {name: mask.clone() for name, mask in MaskStore.of(model).masks.items()}
    prune(clone, 0.8)
    assert_unchanged(model, before)
    assert all(torch.equal(MaskStore.of(model).masks[name], mask) for name, mask in masks.items())
    assert float((clone.fc1.weight == 0).float().mean()) > 0.7
    MaskStore.of(clone).discard(clone)
    assert MaskStore.of(clone) is None
    assert MaskStore.of(model) is not None
    assert bool(clone.fc1.weight.all())


def test_make_permanent_leaves_the_zeros():
    model = prune(mlp(), 0.5)
    before = snapshot(model)
    MaskStore.of(model).make_permanent(model)
    assert MaskStore.of(model) is None
    assert_unchanged(model, before)


def test_make_permanent_zeroes_what_training_wrote():
    model = prune(mlp(), 0.5)
    before = snapshot(model)
    with torch.no_grad():
        model.fc1.weight[model.fc1.weight == 0] = 7.0
    with pytest.warns(UserWarning, match=r"\(.* %\) are not zero any more.*they become zero now"):
        MaskStore.of(model).make_permanent(model)
    assert_unchanged(model, before)


def test_discard_gives_every_bit_back_after_several_prunings():
    model = mlp()
    with torch.no_grad():
        model.fc1.weight[0, 0] = -0.0
    before = snapshot(model)
    prune(model, 0.3, keep_dense=True, exclude_modules=["fc2"])
    prune(model, 0.5)  # fc2 joins, and is kept as well
    prune(model, 0.9, keep_dense=True)
    assert set(MaskStore.of(model).dense) == {"fc1.weight", "fc2.weight"}
    MaskStore.of(model).discard(model)
    assert_unchanged(model, before)
    assert MaskStore.of(model) is None
    prune(model, 0.1)  # and less is possible again


def test_discard_gives_a_shared_weight_back():
    model = tiny_albert()
    before = snapshot(model)
    MaskStore.of(prune(model, 0.5, keep_dense=True)).discard(model)
    assert_unchanged(model, before)


def test_discard_without_dense_weights_is_refused():
    model = prune(mlp(), 0.5)
    before = snapshot(model)
    with pytest.raises(MaskError, match=r"dense weights were not kept: pass keep_dense=True to prune\(\), or reload"):
        MaskStore.of(model).discard(model)
    assert_unchanged(model, before)
    assert MaskStore.of(model) is not None


def test_keep_dense_too_late_is_refused():
    model = prune(mlp(), 0.3)
    before, store = snapshot(model), MaskStore.of(model)
    masks = dict(store.masks)
    with pytest.raises(
        MaskError, match=r"keep_dense=True, but the model was pruned before without it.*reload the model"
    ):
        prune(model, 0.5, keep_dense=True)
    assert_unchanged(model, before)
    assert store.dense is None
    assert store.masks == masks
    assert store.config.sparsity == 0.3


@pytest.mark.parametrize("action", ["apply", "make_permanent", "discard"])
def test_a_changed_model_is_refused(action):
    model = prune(mlp(), 0.5, keep_dense=True)
    model.fc2 = nn.Linear(12, 5)
    with torch.no_grad():
        model.fc1.weight.fill_(3.0)
    before = snapshot(model)
    message = r"the mask of 'fc2\.weight' has shape \(3, 12\), but the model has shape \(5, 12\) there: the model was "
    with pytest.raises(MaskError, match=message + r"changed after pruning; drop_masks\('fc2\.weight'\) leaves the"):
        getattr(MaskStore.of(model), action)(model)
    assert_unchanged(model, before)
    del model.fc2
    with pytest.raises(MaskError, match=r"but the model has no parameter there"):
        getattr(MaskStore.of(model), action)(model)
    assert MaskStore.of(model) is not None


def test_dropping_the_masks_that_no_longer_fit_leaves_the_others():
    model = prune(mlp(), 0.5, keep_dense=True)
    fc1, dense = MaskStore.of(model).masks["fc1.weight"].clone(), MaskStore.of(model).dense["fc1.weight"].clone()
    model.fc2 = nn.Linear(12, 5)
    head = model.fc2.weight.detach().clone()
    with pytest.raises(UnknownNameError, match=r"unknown mask 'fc2\.weigh'.*Did you mean 'fc2\.weight'"):
        drop_masks(model, "fc1.weight", "fc2.weigh")
    assert MaskStore.of(model).masks.keys() == {"fc1.weight", "fc2.weight"}
    drop_masks(model, "fc2.weight")
    with torch.no_grad():
        model.fc1.weight.add_(1)
    MaskStore.of(model).apply(model)
    assert torch.equal(model.fc1.weight != 0, fc1)
    assert same_bits(model.fc2.weight.detach(), head)
    MaskStore.of(model).discard(model)
    assert same_bits(model.fc1.weight.detach(), dense)
    with pytest.raises(MaskError, match="this MLP has no masks, so there are none to drop"):
        drop_masks(model, "fc1.weight")


def test_dropping_the_last_mask():
    model = prune(mlp(), 0.5)
    model.fc1, model.fc2 = nn.Linear(9, 12), nn.Linear(12, 5)
    with pytest.raises(MaskError, match=r"drop_masks\('fc1\.weight', 'fc2\.weight'\) leaves the other masks"):
        MaskStore.of(model).apply(model)
    drop_masks(model, "fc1.weight", "fc2.weight")
    assert MaskStore.of(model) is None


def test_the_masks_can_be_read_but_not_replaced():
    view = MaskStore.of(prune(mlp(), 0.5)).view()
    assert view["fc1.weight"].dtype == torch.bool
    with pytest.raises(TypeError, match="does not support item assignment"):
        view["fc1.weight"] = None


def test_new_masks_keep_only_what_old_ones_keep():
    model = mlp()
    store = MaskStore()
    first, second = torch.rand(12, 8) < 0.5, torch.rand(12, 8) < 0.5
    store.update(model, {"fc1.weight": first}, {}, None, keep_dense=False)
    store.update(model, {"fc1.weight": second}, {}, None, keep_dense=False)
    assert torch.equal(store.masks["fc1.weight"], first & second)
    assert torch.equal(model.fc1.weight != 0, first & second)


def test_repaired_weights_are_written_before_the_mask():
    model = mlp()
    keep = torch.rand(12, 8) < 0.5
    MaskStore().update(model, {"fc1.weight": keep}, {"fc1.weight": torch.full((12, 8), 2.0)}, None, keep_dense=True)
    assert torch.equal(model.fc1.weight, keep * 2.0)
    MaskStore.of(model).discard(model)
    assert torch.equal(model.fc1.weight, mlp().fc1.weight)
