"""Masks as bits: the same masks, an eighth of the bytes."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_prune.errors import MaskError
from hf_prune.kernels.packed_masks import PackedMask, PackedMasks, mask_shape
from hf_prune.kernels.zeroing import zero_removed_
from hf_prune.pipeline import prune
from hf_prune.pruning.held_masks import ATTRIBUTE, HeldMasks, held_by
from hf_prune.pruning.mask_store import MaskStore
from tests import models


def drawn(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


@given(st.lists(st.integers(0, 9), max_size=3), st.integers(0, 3))
def test_bits_give_the_mask_back(shape, seed):
    mask = drawn(*shape, seed=seed)
    packed = PackedMask.of(mask)
    assert packed.bits.numel() == (mask.numel() + 7) // 8
    assert torch.equal(packed.unpacked(), mask)
    assert packed.unpacked().dtype is torch.bool
    assert (packed.numel(), packed.kept()) == (mask.numel(), int(mask.sum()))


def test_parts_begin_at_bytes():
    mask = drawn(100)
    assert torch.equal(PackedMask.of(mask).part(16, 100), mask[16:])
    assert torch.equal(PackedMask.of(mask).part(8, 13), mask[8:13])


def test_masks_that_are_no_rows_in_memory_are_packed_by_value():
    mask = drawn(6, 5).t()
    assert torch.equal(PackedMask.of(mask).unpacked(), mask)
    assert torch.equal(PackedMask.of(torch.ones((), dtype=torch.bool).expand(3, 4)).unpacked(), torch.ones(3, 4) == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(7, 13), (70_000,), (0, 3)])
def test_zeroing_by_bits_is_zeroing_by_the_mask(dtype, shape):
    mask, weight = drawn(*shape), torch.randn(shape).to(dtype)
    expected = weight.masked_fill(~mask, 0)
    zero_removed_(weight, PackedMask.of(mask))
    assert torch.equal(weight, expected)
    crossed = torch.randn(13, 7).t()
    zero_removed_(crossed, PackedMask.of(drawn(7, 13)))
    assert not crossed[~drawn(7, 13)].any()


def test_a_mapping_like_a_dict_of_masks():
    a, b, c = drawn(3, 5), drawn(4), drawn(2, 2, seed=3)
    masks = PackedMasks({"a": a, "b": b})
    assert dict(masks).keys() == {"a", "b"}
    assert torch.equal(masks["a"], a)
    assert mask_shape(masks, "a") == mask_shape({"a": a}, "a") == (3, 5)
    joined = masks | {"b": c}
    assert isinstance(joined, PackedMasks)
    assert torch.equal(joined["b"], c)
    assert torch.equal(masks["b"], b)
    assert joined.packed["a"] is masks.packed["a"]
    assert torch.equal(({"b": c} | masks)["b"], b)
    assert masks == PackedMasks({"a": a, "b": b}) == {"a": a, "b": b}
    assert masks != {"a": a}
    assert masks != {"a": ~a, "b": b}
    assert masks != 3
    assert masks != {"a": 3, "b": b}
    assert masks != {"a": a.float(), "b": b}
    masks |= {"c": c}
    del masks["b"]
    assert list(masks) == ["a", "c"]
    masks["a"][0] = False  # a tensor of its own
    assert torch.equal(masks["a"], a)
    assert repr(masks) == "PackedMasks(a: (3, 5), c: (2, 2))"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_masks_of_other_dtypes_are_refused(dtype):
    with pytest.raises(MaskError, match=f"of dtype {str(dtype)[6:]} was found: expected bool"):
        PackedMasks({"a": drawn(3, 5).to(dtype)})


def test_a_pruned_model_holds_bits():
    model = prune(models.tiny_bert(), 0.5)
    held = [held_by(module) for module in model.modules() if held_by(module) is not None]
    bits = sum(mask.bits.numel() for each in held for mask in each.masks.packed.values())
    weights = sum(mask.numel() for mask in MaskStore.of(model).masks.values())
    assert weights / 8 <= bits < weights / 8 + len(MaskStore.of(model).masks)
    assert all(mask.dtype is torch.bool for mask in MaskStore.of(model).view().values())
    copied = copy.deepcopy(model)
    models.assert_same_masks(copied, MaskStore.of(model))


def test_bool_masks_in_old_pickles_become_bits():
    held = HeldMasks(None)
    state = {"pruning": None, "masks": {"weight": drawn(3, 3)}, "dense": {}}
    held.__setstate__(state)
    again = pickle.loads(pickle.dumps(held))
    assert isinstance(again.masks, PackedMasks)
    assert torch.equal(again.masks["weight"], drawn(3, 3))
    assert ATTRIBUTE == "_hf_prune_masks"  # the name that these pickles have for it
