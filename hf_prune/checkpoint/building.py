"""Limit the size of a model while it is built from a config that others wrote.

A config of a kilobyte can ask for millions of modules, or for buffers of quadratic size. Even building such a model on
the meta device would take the memory and the time, so modules, parameters and buffers are counted as they are added.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

from torch import Tensor
from torch.nn.modules import module as registration

from hf_prune.errors import DataError


@dataclass
class _Count:
    """The total of one kind built so far; something registered again in the same place counts once."""

    kind: str
    most: float
    total: int = 0
    seen: dict[tuple[int, str], int] = field(default_factory=dict)

    def add(self, place: tuple[int, str], size: int, what: str, advice: str) -> None:
        self.total += size - self.seen.get(place, 0)
        self.seen[place] = size
        if self.total > self.most:
            raise DataError(
                f"the config of {what} builds more than {self.most:,.0f} {self.kind}, and was stopped there: {advice}"
            )


@contextmanager
def limited_building(
    what: str, advice: str, *, parameters: float = inf, modules: float = inf, buffer_bytes: float = inf
) -> Iterator[None]:
    """Count the modules that this thread builds within the context, and stop at the limits.

    Args:
        what: The source of the config, for messages.
        advice: What to do if the model is too large, for messages.
        parameters: Most values in parameters.
        modules: Most modules, and most parameter tensors.
        buffer_bytes: Most bytes in buffers.

    Raises:
        DataError: If a limit is exceeded.
    """
    thread = threading.get_ident()
    counts = {
        "module": _Count("modules", modules),
        "tensor": _Count("tensors", modules),
        "parameter": _Count("parameters", parameters),
        "buffer": _Count("bytes of buffers", buffer_bytes),
    }

    def counting(sizes: Callable[[Any], dict[str, int]]) -> Callable[[Any, str, Any], None]:
        def hook(module: Any, name: str, value: Any) -> None:
            if value is not None and threading.get_ident() == thread:
                for kind, size in sizes(value).items():
                    counts[kind].add((id(module), name), size, what, advice)

        return hook

    def of_parameter(value: Tensor) -> dict[str, int]:
        return {"parameter": value.numel(), "tensor": 1}

    with ExitStack() as hooks:
        for register, sizes in (
            (registration.register_module_module_registration_hook, lambda _: {"module": 1}),
            (registration.register_module_parameter_registration_hook, of_parameter),
            (registration.register_module_buffer_registration_hook, lambda b: {"buffer": b.numel() * b.element_size()}),
        ):
            hooks.callback(register(counting(sizes)).remove)
        yield
