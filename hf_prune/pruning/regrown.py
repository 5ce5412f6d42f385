"""Trainings that know nothing of masks: what masks remove is not zero any more, or only since masks were applied."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_prune.pruning.held_masks import gather_masks, take_trained_by
from hf_prune.utils.notices import warn_user
from hf_prune.utils.number_formats import plain_values


@torch.no_grad()
def count_regrown(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Count the weights that masks remove.

    Args:
        masks: Bool masks by parameter name.
        weights: Weights by parameter name. Offloaded ones, and those that are spread over processes, do not count.

    Returns:
        How many of them are not zero, and how many there are.
    """
    regrown = removed = 0
    for name, weight in weights.items():
        mask = masks.get(name)
        if mask is None or mask.shape != weight.shape or weight.is_meta or isinstance(weight, DTensor):
            continue
        removed += mask.numel() - int(mask.count_nonzero())
        regrown += int((plain_values(weight.detach()).ne(0) > mask.to(weight.device)).count_nonzero())
    return regrown, removed


def warn_of_regrown(
    model: nn.Module, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None, consequence: str
) -> None:
    """Warn if weights that masks remove are not zero any more; once, if they are only since masks were applied unasked.

    Args:
        model: The model.
        masks: Bool masks by parameter name.
        weights: Weights by parameter name; None for the model's parameters.
        consequence: What regrown weights mean for what is done to the model now.
    """
    regrown, removed = count_regrown(masks, dict(model.named_parameters()) if weights is None else weights)
    trained_by = " and ".join(sorted(take_trained_by(model)))
    if regrown:
        warn_user(
            f"{regrown:,} of the {removed:,} weights that the masks remove ({100 * regrown / removed:.2f} %) are not "
            f"zero any more, since an optimizer or something else wrote to them: {consequence}. apply_masks() sets "
            f"them to zero again; keep_sparse(optimizer) before a training keeps them zero"
        )
    elif trained_by:
        warn_user(
            f"{trained_by} trained weights with masks, and the masks were applied after each step: what they remove is "
            f"zero as before. make_permanent() before a training drops the masks, so that it grows back; "
            f"keep_sparse(optimizer) says that it is to stay"
        )


def watch_state_dict(model: nn.Module) -> None:
    """Have a model that transformers saves by itself say so if its state dict holds weights that grew back.

    Args:
        model: The module that was pruned. One with the methods of hf_prune looks when it is saved.
    """
    if not any(hook is _look for hook in model._state_dict_pre_hooks.values()):
        model.register_state_dict_pre_hook(_look)


def unwatch_state_dict(model: nn.Module) -> None:
    """Undo :func:`watch_state_dict`, at the model and all modules inside it."""
    for module in model.modules():
        for key in [key for key, hook in module._state_dict_pre_hooks.items() if hook is _look]:
            del module._state_dict_pre_hooks[key]


def _look(model: nn.Module, *_: object) -> None:
    if not hasattr(model, "apply_masks"):
        warn_of_regrown(
            model,
            gather_masks(model).masks,
            None,
            "the state dict holds them as they are; merge_lora(), in place of merge_and_unload(), keeps the zeros of a "
            "model with adapters",
        )
