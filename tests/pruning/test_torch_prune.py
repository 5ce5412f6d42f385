"""Adopting what torch.nn.utils.prune left behind."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from hf_prune.errors import MaskError, PlanError
from hf_prune.pipeline import prune
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.pruning.torch_prune import from_torch_prune
from tests.models import assert_unchanged, mlp, same_bits, snapshot, tied_linears, tiny_batches, tiny_bert


def torch_pruned(model: nn.Module) -> nn.Module:
    """Weights of both layers and the bias of one."""
    torch_prune.l1_unstructured(model.fc1, "weight", amount=0.5)
    torch_prune.ln_structured(model.fc2, "weight", amount=0.25, n=2, dim=1)
    torch_prune.random_unstructured(model.fc1, "bias", amount=5)
    return model


def test_weights_and_biases_are_adopted():
    dense = mlp()
    model = torch_pruned(mlp())
    effective = {
        f"{n}.{k}": getattr(getattr(model, n), k).detach().clone() for n in ("fc1", "fc2") for k in ("weight", "bias")
    }
    wanted = {"fc1.weight": model.fc1.weight_mask, "fc2.weight": model.fc2.weight_mask, "fc1.bias": model.fc1.bias_mask}
    batch = tiny_batches(model)[0]
    logits = model(**batch).logits
    assert from_torch_prune(model) is model
    assert set(model.state_dict()) == set(dense.state_dict())
    assert all(isinstance(parameter, nn.Parameter) for parameter in (model.fc1.weight, model.fc1.bias))
    assert torch.equal(model(**batch).logits, logits)
    masks = MaskStore.of(model).masks
    assert masks.keys() == wanted.keys()
    assert all(mask.dtype == torch.bool and torch.equal(mask, wanted[name].bool()) for name, mask in masks.items())
    assert all(torch.equal(parameter, effective[name]) for name, parameter in model.named_parameters())
    assert int((~masks["fc1.bias"]).sum()) == 5
    assert MaskStore.of(model).config is None
    assert not model.fc1._forward_pre_hooks


def test_no_negative_zero_is_left():
    """weight * mask gives -0.0 for a negative weight."""
    model = torch_pruned(mlp())
    assert bool(torch.signbit(model.fc1.weight[model.fc1.weight == 0]).any())
    from_torch_prune(model)
    for name, mask in MaskStore.of(model).masks.items():
        parameter = model.get_parameter(name)
        assert same_bits(parameter[~mask], torch.zeros(int((~mask).sum())))


def test_nan_under_the_mask_is_gone():
    model = mlp()
    torch_prune.l1_unstructured(model.fc1, "weight", amount=0.5)
    with torch.no_grad():
        model.fc1.weight_orig[model.fc1.weight_mask == 0] = float("nan")
    from_torch_prune(model)
    assert torch.isfinite(model.fc1.weight).all()


def test_global_pruning_of_a_transformer():
    model, same = tiny_bert(), tiny_bert()
    linears = [(m, "weight") for m in model.modules() if isinstance(m, nn.Linear)]
    torch_prune.global_unstructured(linears, pruning_method=torch_prune.L1Unstructured, amount=0.4)
    from_torch_prune(model)
    prune(same, 0.4, scope="global")
    masks, expected = MaskStore.of(model).masks, MaskStore.of(same).masks
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], expected[name]) for name in masks)
    assert_unchanged(model, snapshot(same))


def test_repeated_pruning():
    """A PruningContainer holds the product of its masks."""
    model = mlp()
    torch_prune.l1_unstructured(model.fc1, "weight", amount=0.3)
    torch_prune.random_unstructured(model.fc1, "weight", amount=0.5)
    mask = model.fc1.weight_mask.bool()
    from_torch_prune(model)
    assert torch.equal(MaskStore.of(model).masks["fc1.weight"], mask)
    assert int((~mask).sum()) == 29 + round(0.5 * 67)


def test_it_can_be_pruned_further():
    model = from_torch_prune(torch_pruned(mlp()))
    early = {name: mask.clone() for name, mask in MaskStore.of(model).masks.items()}
    prune(model, 0.75)
    masks = MaskStore.of(model).masks
    assert [int((~masks[n]).sum()) for n in ("fc1.weight", "fc2.weight")] == [72, 27]
    assert not any(bool((masks[name] & ~mask).any()) for name, mask in early.items())


def test_the_dense_weights_come_back_if_they_were_kept():
    dense = snapshot(mlp())
    model = from_torch_prune(torch_pruned(mlp()), keep_dense=True)
    MaskStore.of(model).discard(model)
    assert_unchanged(model, dense)
    model = from_torch_prune(torch_pruned(mlp()))
    with pytest.raises(MaskError, match="dense weights were not kept"):
        MaskStore.of(model).discard(model)


def test_a_tied_weight_is_adopted_once():
    model = tied_linears()
    torch_prune.l1_unstructured(model.second, "weight", amount=0.5)
    mask = model.second.weight_mask.bool()
    from_torch_prune(model)
    assert model.first.weight is model.second.weight
    assert list(MaskStore.of(model).masks) == ["first.weight"]
    assert torch.equal(model.first.weight != 0, mask)


def test_a_model_without_such_masks_is_refused():
    model = mlp()
    torch_prune.remove(torch_prune.l1_unstructured(model.fc1, "weight", amount=0.5), "weight")
    before = snapshot(model)
    with pytest.raises(
        MaskError, match=r"no parameter of MLP was pruned with torch\.nn\.utils\.prune: .*after prune\.remove"
    ):
        from_torch_prune(model)
    assert_unchanged(model, before)


def test_two_kinds_of_masks_are_refused():
    model = prune(mlp(), 0.3)
    torch_prune.l1_unstructured(model.fc2, "bias", amount=1)
    before = snapshot(model)
    with pytest.raises(
        MaskError, match=r"has masks of hf_prune already: call make_permanent\(\) or discard_masks\(\) first"
    ):
        from_torch_prune(model)
    assert_unchanged(model, before)


def test_other_orig_parameters_are_left_alone():
    model = mlp()
    model.fc2.register_parameter("scale_orig", nn.Parameter(torch.ones(2)))
    torch_prune.l1_unstructured(model.fc1, "weight", amount=0.5)
    from_torch_prune(model)
    assert model.fc2.scale_orig.tolist() == [1, 1]


def test_pruning_over_foreign_masks_is_refused():
    """prune() would otherwise skip such weights without a word."""
    model = torch_pruned(mlp())
    before = snapshot(model)
    with pytest.raises(
        PlanError, match=r"fc1 was pruned with torch\.nn\.utils\.prune: call hf_prune\.from_torch_prune"
    ):
        prune(model, 0.5)
    assert_unchanged(model, before)
    prune(from_torch_prune(model), 0.6)
