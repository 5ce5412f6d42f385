"""Whether masks fit the weights of a model; how they are applied to these, and follow them when they are resized."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping

import torch
from torch import Tensor, nn

from hf_prune.errors import MaskError
from hf_prune.kernels.packed_masks import PackedMask, mask_shape
from hf_prune.kernels.zeroing import zero_removed_
from hf_prune.utils.number_formats import is_wrapped
from hf_prune.utils.offloaded_weights import values_of, write_weight


def check_fit(model: nn.Module, masks: Mapping[str, Tensor], replaced: Collection[str]) -> None:
    """Make sure that masks fit the model.

    Args:
        model: The model.
        masks: Bool masks by parameter name.
        replaced: Names of masks whose module is not part of the model any more.

    Raises:
        MaskError: If a masked parameter is missing, has another shape, or is of a tensor class such as torchao's.
    """
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    wrapped = [name for name in masks if name in parameters and is_wrapped(parameters[name])]
    if wrapped:
        raise MaskError(
            f"{wrapped[0]} has become a {type(parameters[wrapped[0]]).__name__}, as {len(wrapped)} of {len(masks)} "
            f"weights with masks have, and masks are of plain weights: save the pruned model before quantizing, and "
            f"quantize what is loaded; or drop_masks(*model.masks), which leaves the zeros as they are"
        )
    misfits = [name for name in masks if name in replaced or shapes.get(name) != mask_shape(masks, name)]
    if not misfits:
        return
    name, shape = misfits[0], tuple(mask_shape(masks, misfits[0]))
    present = "no parameter" if name not in shapes else f"shape {tuple(shapes[name])}"
    if shapes.get(name) == shape:
        present = "another module"
    raise MaskError(
        f"the mask of {name!r} has shape {shape}, but the model has {present} there: the model was changed after "
        f"pruning; drop_masks({', '.join(map(repr, misfits))}) leaves the other masks"
    )


@torch.no_grad()
def zero_weight(model: nn.Module, name: str, mask: Tensor | PackedMask) -> None:
    """Set what a mask removes of a weight to exact zero, wherever accelerate has offloaded it.

    Args:
        model: The model.
        name: The name of the parameter.
        mask: Bool or bits, True = keep, on the device of the parameter, or any for an offloaded one.
    """
    if not (parameter := model.get_parameter(name)).is_meta:
        zero_removed_(parameter, mask)
        return
    values = values_of(model, name, parameter)
    mask = mask.unpacked() if isinstance(mask, PackedMask) else mask
    removed = ~mask.to(values.device)
    if bool((values.ne(0) & removed).any()):  # what is on the disk is written only if it changes
        write_weight(model, name, values.masked_fill(removed, 0))


def resize_like(
    model: nn.Module, before: Mapping[str, torch.Size], tensors: MutableMapping[str, Tensor], is_mask: bool
) -> set[str]:
    """Have masks or dense weights follow parameters that grew or shrank at the end, in place.

    Args:
        model: The model after the resize.
        before: The shapes of its parameters before.
        tensors: Masks or dense weights by parameter name. Where a parameter grew, a mask keeps the new weights, and a
            dense weight takes their values.
        is_mask: Which of the two it is.

    Returns:
        The names of those that changed.
    """
    resized = set()
    for name, parameter in model.named_parameters():
        if name in tensors and mask_shape(tensors, name) == before.get(name) != parameter.shape:
            common = tuple(slice(min(sizes)) for sizes in zip(parameter.shape, before[name], strict=True))
            new = torch.ones_like(parameter, dtype=torch.bool) if is_mask else parameter.detach().clone()
            new[common] = tensors[name][common].to(new.device)
            tensors[name] = new
            resized.add(name)
    return resized
