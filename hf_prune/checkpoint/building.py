"""How large a model may become while it is built from a stranger's config: it is counted as it grows.

A config of a kilobyte can ask for millions of modules, or for buffers that grow with a square. Building it just to look
would already take the memory and the time.
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
    """What has been built so far of one kind; what is registered again in the same place counts once."""

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
    """Within this context, modules that this thread builds are counted, and none is built beyond the limits.

    Args:
        what: What is built, for messages.
        advice: What to do about one that is too large.
        parameters: The most values of parameters.
        modules: The most modules, and the most parameters that are no module of their own.
        buffer_bytes: The most bytes of buffers.

    Raises:
        DataError: If there are more.
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
