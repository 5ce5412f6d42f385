"""Keep what is removed at zero under any torch optimizer, in trainings that know nothing of masks.

Weights with masks carry a hook that is called when a gradient reaches them. From then until the next step, a hook of
all optimizers waits for the one that holds such weights, and gives it a hook of its own, which applies the masks after
each of its steps. So nothing is left with other optimizers, and a model that is not trained costs nothing.

Hooks of a parameter do not travel, those of a module do: the module that was pruned has one that guards, before each
forward pass that records gradients, the parameters that are new there: in copies, pickles, and after weights were
replaced.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from hf_prune.kernels.packed_masks import PackedMask
from hf_prune.kernels.zeroing import zero_removed_
from hf_prune.pruning.held_masks import HeldMasks, held_by


class _Guard:
    """The hook of a parameter, which knows where the mask is.

    A weak reference to the parameter, in a registry say, would keep ``torch.utils.swap_tensors`` from it.
    """

    def __init__(self, held: HeldMasks, key: str) -> None:
        self.held, self.key = held, key

    def __call__(self, _: Tensor) -> None:
        if self.key in self.held.masks:
            _waiting.setdefault(weakref.ref(self.held, _forget), set()).add(self.key)
            if not _watch:
                _watch.append(register_optimizer_step_pre_hook(_before_any_step))

    def mask_for(self, parameter: Tensor) -> PackedMask | None:
        """The mask, on the parameter's device; None if there is none any more, or one of another shape."""
        mask = self.held.masks.packed.get(self.key)
        if mask is None or mask.shape != parameter.shape:
            return None
        if mask.device != parameter.device:
            mask = self.held.masks.packed[self.key] = mask.to(parameter.device)
        return mask


_guarded: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # optimizers that have a hook of their own
_waiting: dict[weakref.ref[HeldMasks], set[str]] = {}  # what got a gradient, and no step yet
_watch: list[RemovableHandle] = []  # the hook of all optimizers, while something waits


def guard_masks(model: nn.Module) -> None:
    """Have any optimizer of torch that trains weights with masks keep their zeros.

    Parameters that FSDP replaces are not reached: there, :func:`hf_prune.keep_sparse` does it.

    Args:
        model: The module that was pruned, or any other whose modules hold masks.
    """
    _guard_parameters(model)
    if not any(hook is guard_again for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(guard_again)


def unguard_masks(model: nn.Module) -> None:
    """Take the hooks off a model and its parameters again."""
    for parameter in model.parameters():
        hooks: dict[int, Any] = parameter._post_accumulate_grad_hooks or {}
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Guard)]:
            del hooks[key]
    for module in model.modules():
        _remove_from(module)


def guard_again(model: nn.Module, _: object) -> None:
    """Before a forward pass: guard parameters that took the place of others; without masks, the hook goes."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if not _guard_parameters(model, trained=True):
        _remove_from(model)


def _remove_from(module: nn.Module) -> None:
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is guard_again]:
        del module._forward_pre_hooks[key]


def _guard_parameters(model: nn.Module, trained: bool = False) -> bool:
    """Guard all parameters with masks, or those that are trained now; returns whether there are masks."""
    found = False
    for module in model.modules():
        held = held_by(module)
        for key in () if held is None else held.masks:
            found = True
            parameter = module._parameters.get(key)
            if held is None or not isinstance(parameter, nn.Parameter) or isinstance(parameter, DTensor):
                continue
            if parameter.is_leaf and not parameter.is_inference() and (parameter.requires_grad or not trained):
                _guard(parameter, held, key)
    return found


def _guard(parameter: nn.Parameter, held: HeldMasks, key: str) -> None:
    """Watch a parameter, also one that is frozen now and may be trained later."""
    if (guard := _guard_of(parameter)) is not None:
        guard.held, guard.key = held, key
        # swap_tensors leaves the hooks at the parameter, where nothing calls them until they are set once more.
        parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks
        return
    frozen = not parameter.requires_grad
    try:
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(_Guard(held, key))
    finally:
        if frozen:
            parameter.requires_grad_(False)


def _guard_of(parameter: Tensor) -> _Guard | None:
    hooks: dict[int, Any] = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return next((hook for hook in hooks.values() if isinstance(hook, _Guard)), None)


def _before_any_step(optimizer: Optimizer, *_: Any) -> None:
    if optimizer not in _guarded and any(_waits(p) for group in optimizer.param_groups for p in group["params"]):
        _guarded.add(optimizer)
        optimizer.register_step_post_hook(_after_step)


def _waits(parameter: Tensor) -> bool:
    """Whether a parameter with a mask got a gradient, and no step yet."""
    guard = _guard_of(parameter)
    return guard is not None and guard.key in _waiting.get(weakref.ref(guard.held), ())


@torch.no_grad()
def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (guard := _guard_of(parameter)) is None:
                continue
            if (mask := guard.mask_for(parameter)) is not None and not parameter.is_meta:
                zero_removed_(parameter.detach(), mask)
                guard.held.trained_by = type(optimizer).__name__
            if (keys := _waiting.get(reference := weakref.ref(guard.held, _forget))) is not None:
                keys.discard(guard.key)
                if not keys:
                    del _waiting[reference]
    _stop_waiting()


def _forget(held: weakref.ref[HeldMasks]) -> None:
    """Masks that are gone wait for no step."""
    _waiting.pop(held, None)
    _stop_waiting()


def _stop_waiting() -> None:
    """Take the hook of all optimizers away, unless something still waits for a step."""
    if not _waiting and _watch:
        _watch.pop().remove()
