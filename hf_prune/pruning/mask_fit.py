"""Whether masks fit the weights of a model, and how they follow weights that are resized."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from hf_prune.errors import MaskError
from hf_prune.utils.offloaded_weights import values_of


def check_fit(model: nn.Module, masks: Mapping[str, Tensor], replaced: Collection[str]) -> None:
    """Make sure that masks fit the model.

    Args:
        model: The model.
        masks: Bool masks by parameter name.
        replaced: Names of masks whose module is not part of the model any more.

    Raises:
        MaskError: If a masked parameter is missing or has another shape.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    misfits = [name for name, mask in masks.items() if name in replaced or shapes.get(name) != mask.shape]
    if not misfits:
        return
    name, shape = misfits[0], tuple(masks[misfits[0]].shape)
    present = "no parameter" if name not in shapes else f"shape {tuple(shapes[name])}"
    if shapes.get(name) == shape:
        present = "another module"
    raise MaskError(
        f"the mask of {name!r} has shape {shape}, but the model has {present} there: the model was changed after "
        f"pruning; drop_masks({', '.join(map(repr, misfits))}) leaves the other masks"
    )


def check_offloaded(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Make sure that what masks remove of offloaded weights is zero: such weights cannot be written here.

    Raises:
        MaskError: If something is not.
    """
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if parameters[name].is_meta and bool(values_of(model, name, parameters[name]).cpu()[~mask.cpu()].any()):
            raise MaskError(
                f"{name} is offloaded, and has non-zero weights that its mask removes: load the model without "
                f"offloading, and apply the masks there"
            )


def resize_like(
    model: nn.Module, before: Mapping[str, torch.Size], tensors: dict[str, Tensor], is_mask: bool
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
        if name in tensors and tensors[name].shape == before.get(name) != parameter.shape:
            common = tuple(slice(min(sizes)) for sizes in zip(parameter.shape, before[name], strict=True))
            new = torch.ones_like(parameter, dtype=torch.bool) if is_mask else parameter.detach().clone()
            new[common] = tensors[name][common].to(new.device)
            tensors[name] = new
            resized.add(name)
    return resized
