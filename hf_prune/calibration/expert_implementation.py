"""Which implementation multiplies the packed experts of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def experts_by(implementation: str, owners: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, experts of transformers are multiplied in another way; afterwards as before.

    Args:
        implementation: ``"eager"``, one by one, as their class is written, which calibration can watch; or
            ``"batched_mm"``, each token by copies of the weights of its experts, which can be traced.
        owners: The modules that hold them, or all modules of a model.
    """
    attribute = "_experts_implementation_internal"
    configs: dict[int, Any] = {}
    for owner in owners:
        config = getattr(owner, "config", None)
        if config is not None and attribute in vars(config):
            configs.setdefault(id(config), config)
    previous: Mapping[int, Any] = {key: vars(config)[attribute] for key, config in configs.items()}
    try:
        for config in configs.values():
            vars(config)[attribute] = implementation
        yield
    finally:
        for key, config in configs.items():
            vars(config)[attribute] = previous[key]
