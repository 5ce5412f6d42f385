"""Hooks on the modules of interest in a run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_prune.utils.forward import without_autocast


@dataclass(frozen=True, eq=False)
class Watcher:
    """A module of interest in a run, and the function that sees its calls.

    Args:
        module: The module.
        call: Gets the module, its arguments, its keyword arguments and its output; what it returns, if anything, takes
            the place of the arguments or the output.
        after: Call it after the module's forward; before it there is no output yet, and None in its place.
        waits: Whether the run goes on until the module was called.
    """

    module: nn.Module
    call: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
    after: bool = False
    waits: bool = True

    def install(self, hooks: ExitStack, remaining: set[object] | None) -> None:
        """Register the hook.

        Args:
            hooks: Removes the hook at its end.
            remaining: The watchers that the run still waits for; None if it does not stop early.
        """

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
            with without_autocast():  # a Trainer wraps forward in one, and sums of products are for float32
                replacement = self.call(module, args, kwargs, output)
            if remaining is not None and self.waits:
                remaining.discard(self)
                if not remaining:
                    raise Stop
            return replacement

        if self.after:
            hooks.callback(self.module.register_forward_hook(hook, with_kwargs=True).remove)
        else:
            hooks.callback(self.module.register_forward_pre_hook(hook, with_kwargs=True).remove)


class Stop(Exception):
    """Everything of interest was seen, and the rest of the run is not needed; never leaves the package."""


def tensor_version(x: Tensor) -> object:
    """Changes with every operation in place; of a tensor that does not count them it is like no other."""
    return object() if x.is_inference() else x._version
