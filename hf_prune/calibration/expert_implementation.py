"""Which implementation multiplies the packed experts of transformers: one by one while calibration watches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def eager_experts(owners: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, experts of transformers are multiplied one by one, as their class is written; afterwards as before.

    Args:
        owners: The modules that hold them.
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
            vars(config)[attribute] = "eager"
        yield
    finally:
        for key, config in configs.items():
            vars(config)[attribute] = previous[key]
