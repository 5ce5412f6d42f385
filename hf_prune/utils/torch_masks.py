"""Masks of torch.nn.utils.prune."""

from __future__ import annotations

from torch import nn

from hf_prune.errors import PlanError


def refuse_torch_masks(model: nn.Module) -> None:
    """Make sure that no weight of a model is computed from masks of torch.nn.utils.prune.

    Raises:
        PlanError: If one is.
    """
    for name, module in model.named_modules():
        if "weight_orig" in module._parameters and "weight_mask" in module._buffers:
            raise PlanError(
                f"{name or type(module).__name__} was pruned with torch.nn.utils.prune: call "
                f"hf_prune.from_torch_prune(model) first, which adopts its masks"
            )
