"""Hooks that see what flows into modules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_prune.calibration.accumulators import InputAccumulator
from hf_prune.calibration.padding import Padding, first_input


class Leader:
    """Gathers the inputs of a target, for others as well that get the same tensors, and sees that they do.

    Args:
        total: Where they are added.
        padding: Knows which rows count.
        layout: As in :class:`~hf_prune.kernels.matrix.Target`.
    """

    def __init__(self, total: InputAccumulator, padding: Padding, layout: str) -> None:
        self.total = total
        self._padding, self._layout = padding, layout
        self._seen: list[tuple[Tensor, object]] = []  # of the batch that is running
        self._followers: list[list[tuple[Tensor, object]]] = []

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        """Add the inputs of one call."""
        x = first_input(args, kwargs)
        self.total.add(self._padding.rows(module, x, self._layout))
        self._seen.append((x, tensor_version(x)))

    def follower(self) -> Callable[..., None]:
        """A hook that checks that another module gets the same inputs, call by call."""
        seen: list[tuple[Tensor, object]] = []
        self._followers.append(seen)

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            x = first_input(args, kwargs)
            seen.append((x, tensor_version(x)))

        return note

    def end_batch(self) -> bool:
        """Whether all have seen the same tensors."""
        every = [[(id(x), version) for x, version in seen] for seen in (self._seen, *self._followers)]
        for seen in (self._seen, *self._followers):
            seen.clear()
        return all(seen == every[0] for seen in every)


@dataclass(frozen=True, eq=False)
class Watcher:
    """A module of interest in a run.

    Args:
        module: The module.
        call: Gets the module, its arguments, its keyword arguments and its output; what it returns, if anything, takes
            the output's place.
        after: Call it after the module's forward; before it there is no output yet, and None in its place.
        waits: Whether the run goes on until the module was called.
    """

    module: nn.Module
    call: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
    after: bool = False
    waits: bool = True

    def install(self, hooks: ExitStack, left: set[object] | None) -> None:
        """Hook it up.

        Args:
            hooks: Removes the hook at its end.
            left: What the run still waits for; None if it does not stop early.
        """

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
            found = self.call(module, args, kwargs, output)
            if left is not None and self.waits:
                left.discard(self)
                if not left:
                    raise Stop
            return found

        if self.after:
            hooks.callback(self.module.register_forward_hook(hook, with_kwargs=True).remove)
        else:
            hooks.callback(self.module.register_forward_pre_hook(hook, with_kwargs=True).remove)


class Stop(Exception):
    """Everything of interest was seen; never leaves this module."""


def tensor_version(x: Tensor) -> object:
    """Changes with every operation in place; of a tensor that does not count them it is like no other."""
    return object() if x.is_inference() else x._version
