"""Steps of a training without dropout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

Setting = tuple[object, str]  # an attribute with a probability, of a module or of the config that it reads


def dropout_settings(model: nn.Module) -> list[Setting]:
    """Every probability of dropout in a model, layers that are skipped at random (LayerDrop, stochastic depth) included.

    Args:
        model: The model.
    """
    found: list[Setting] = []
    configs: dict[int, object] = {}
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            found.append((module, "p"))
        config = module.__dict__.get("config")
        if hasattr(config, "__dict__"):
            configs[id(config)] = config
        found += _named_so(module)
    return found + [setting for config in configs.values() for setting in _named_so(config)]


def _named_so(owner: object) -> list[Setting]:
    return [(owner, name) for name, value in vars(owner).items() if "drop" in name and isinstance(value, float)]


@contextmanager
def without_dropout(settings: Sequence[Setting]) -> Iterator[None]:
    """Inside, the probabilities are zero; afterwards they are what they were.

    Args:
        settings: From :func:`dropout_settings`.
    """
    before = [vars(owner)[name] for owner, name in settings]
    try:
        for owner, name in settings:
            vars(owner)[name] = 0.0
        yield
    finally:
        for (owner, name), value in zip(settings, before, strict=True):
            vars(owner)[name] = value
