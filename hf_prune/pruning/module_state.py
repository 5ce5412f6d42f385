"""Undo what an interrupt leaves behind: hooks, replaced methods and modes of modules, and gradients switched off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from hf_prune.architectures.bypass import is_bypass
from hf_prune.pruning.optimizer_guard import guard_again
from hf_prune.utils.interrupts import run_to_the_end

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_SETTINGS_OF_HOOKS = ("_with_kwargs", "_always_called")
Function = TypeVar("Function", bound=Callable[..., Any])


def restores_modules(function: Function) -> Function:
    """Have a function of a model leave the modules as they were if it ends in an error or by Ctrl-C.

    Whatever hooks a module removes the hook itself. But an interrupt can come between a hook and the note that it has
    to be removed, or while several are removed. This looks at all modules once more.

    Args:
        function: Takes the model first.
    """

    @functools.wraps(function)
    def restoring(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(model, nn.Module):  # of which the function complains
            return function(model, *args, **kwargs)
        with _ModuleState(model):
            return function(model, *args, **kwargs)

    return restoring  # type: ignore[return-value]


class _ModuleState:
    """A context, and no generator: within contextlib's own lines an interrupt would be lost."""

    def __init__(self, model: nn.Module) -> None:
        self._records_gradients = torch.is_grad_enabled()  # Ctrl-C while ``no_grad`` ends would leave them off
        self._modules = [
            (module, module.training, module.__dict__.get("forward"), [set(getattr(module, key)) for key in _HOOKS])
            for module in model.modules()
        ]

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            run_to_the_end(self._restore)

    def _restore(self) -> None:
        torch.set_grad_enabled(self._records_gradients)
        for module, training, forward, hooks in self._modules:
            module.training = training
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
            for kind, before in zip(_HOOKS, hooks, strict=True):
                _remove_new(module, kind, before)


def _remove_new(module: nn.Module, kind: str, before: set[int]) -> None:
    hooks = getattr(module, kind)
    for key in set(hooks) - before:
        # A layer that is switched off stays so once all is done, and what guards masks goes with these.
        if not is_bypass(hooks[key]) and hooks[key] is not guard_again:
            for name in _SETTINGS_OF_HOOKS:
                getattr(module, kind + name, {}).pop(key, None)
            del hooks[key]
