"""Interoperability with ``torch.nn.utils.prune``: adopt a model that was pruned with it."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from hf_prune.errors import CheckpointError, MaskError
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.utils.number_formats import refuse_quantized

Model = TypeVar("Model", bound=nn.Module)


def masked_weight(name: str, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What ``torch.nn.utils.prune`` computes with, from what it stores: the weight times the mask.

    Args:
        name: Of the weight.
        weight: Its ``weight_orig``.
        mask: Its ``weight_mask``, of the same shape; values besides 0 and 1 scale the weight.

    Returns:
        The weight, +0.0 wherever the mask is 0, and where the mask is not.

    Raises:
        CheckpointError: If the shapes differ, or the mask is not finite.
    """
    if mask.shape != weight.shape:
        raise CheckpointError(
            f"the mask of {name} has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}: expected the same"
        )
    factors = mask.to(weight.dtype)
    if not bool(torch.isfinite(factors).all()):
        raise CheckpointError(f"the mask of {name} has values that are not finite: expected numbers such as 0 and 1")
    keep = factors != 0
    return (weight * factors).masked_fill(~keep, 0), keep


def from_torch_prune(model: Model, *, keep_dense: bool = False) -> Model:
    """Turn ``weight_orig`` and ``weight_mask`` into plain weights and a mask store, in place.

    Afterwards the model has its usual parameters and state-dict keys, computes the same, and can be pruned
    further, saved and loaded like any other. Masks of biases are adopted too. Where a pruned weight is tied to
    another module's, one mask now holds for both, which torch.nn.utils.prune kept apart.

    Args:
        model: A model pruned with ``torch.nn.utils.prune``, by any of its methods.
        keep_dense: Keep the original weights, so that ``discard_masks`` can give them back.

    Returns:
        The model.

    Raises:
        PlanError: If the model is quantized.
        MaskError: If nothing in the model was pruned that way, or the model has masks of hf_prune already.

    Example:
        >>> layer = torch_prune.l1_unstructured(nn.Linear(4, 2), "weight", amount=0.5)
        >>> sorted(name for name, _ in from_torch_prune(layer).named_parameters())
        ['bias', 'weight']
    """
    refuse_quantized(model)
    if MaskStore.of(model) is not None:
        raise MaskError("the model has masks of hf_prune already: call make_permanent() or discard_masks() first")
    pruned = [
        (module, key.removesuffix("_orig"))
        for module in model.modules()
        for key in list(module._parameters)
        if key.endswith("_orig") and f"{key.removesuffix('_orig')}_mask" in module._buffers
    ]
    if not pruned:
        raise MaskError(
            f"no parameter of {type(model).__name__} was pruned with torch.nn.utils.prune: expected *_orig parameters "
            f"with *_mask buffers; after prune.remove() only zeros are left, and there is nothing to adopt"
        )
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for module, key in pruned:
        mask, original = module._buffers[f"{key}_mask"], module._parameters[f"{key}_orig"]
        assert mask is not None
        assert original is not None
        keep, dense = mask.bool(), original.detach()
        torch_prune.remove(module, key)  # gives the parameter a new storage; dense keeps the old one
        found[id(module._parameters[key])] = (keep, dense)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    store = MaskStore(
        masks=PackedMasks({names[key]: keep for key, (keep, _) in found.items()}),
        dense={names[key]: dense for key, (_, dense) in found.items()} if keep_dense else None,
    )
    store.attach(model)
    store.apply(model)
    return model
