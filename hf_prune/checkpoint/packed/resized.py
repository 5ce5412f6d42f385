"""Give the modules of a model the sizes that the code in a checkpoint lists.

This module imports nothing from hf_prune, since its code is also written into checkpoints, see ``remote_code.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def resize_modules(model: nn.Module, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Change modules in place, before their weights are loaded.

    Args:
        model: A model, on any device.
        changes: By the name of a module: ``"removed"``, names of modules in it that go; ``"tensors"``, new shapes of
            its parameters and buffers; ``"attributes"``, new values of its attributes.
    """
    for name, change in changes.items():
        module = model.get_submodule(name)
        for key in change.get("removed", ()):
            del module._modules[key]
        for key, shape in change.get("tensors", {}).items():
            old = getattr(module, key)
            new = torch.empty(shape, dtype=old.dtype, device=old.device)
            is_parameter = isinstance(old, nn.Parameter)
            setattr(module, key, nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new)
        for key, value in change.get("attributes", {}).items():
            setattr(module, key, value)
