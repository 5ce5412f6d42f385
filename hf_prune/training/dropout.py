"""Steps of a training without dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, every probability of dropout in a model is zero; afterwards it is what it was.

    That is ``p`` of dropout modules, and every attribute of a module or its config that is named so: also the
    probability with which layers are skipped (LayerDrop, stochastic depth).

    Args:
        model: The model.
    """
    before: list[tuple[dict[str, Any], str, float]] = []
    seen: set[int] = set()
    for module in model.modules():
        for owner in (module, module.__dict__.get("config")):
            values = getattr(owner, "__dict__", None)
            if values is None or id(values) in seen:
                continue
            seen.add(id(values))
            for name, value in values.items():
                if isinstance(value, float) and value and _is_dropout(owner, name):
                    before.append((values, name, value))
    try:
        for values, name, _ in before:
            values[name] = 0.0
        yield
    finally:
        for values, name, value in before:
            values[name] = value


def _is_dropout(owner: object, name: str) -> bool:
    if name == "p":
        return isinstance(owner, _DropoutNd)
    return "drop" in name and "prenet" not in name  # SpeechT5's is on in evaluation as well
