"""What has to change in the modules of a model that a config builds, to load a shrunk checkpoint into it.

The code in a checkpoint makes these changes where hf_prune is not installed, see ``packed/remote_code.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_prune.checkpoint.packed.resized import resize_modules
from hf_prune.errors import CheckpointError
from hf_prune.structured.shrink import resize

Changes = dict[str, dict[str, Any]]


def changes_of_checkpoint(config: Mapping[str, Any]) -> Changes:
    """The changes for a checkpoint of a class of transformers.

    Args:
        config: The content of its ``config.json``.

    Returns:
        As :func:`hf_prune.checkpoint.packed.resized.resize_modules` takes them; empty if the config tells all sizes.

    Raises:
        CheckpointError: If they cannot be expressed, or no class of transformers is named.
    """
    structure = (config.get("quantization_config") or {}).get("structure")
    if not structure:
        return {}
    import transformers

    named = [getattr(transformers, str(name), None) for name in config.get("architectures") or ()]
    if len(named) != 1 or named[0] is None:
        raise CheckpointError(
            f"remote_code=True: config.json names the architectures {config.get('architectures')}, expected one class "
            f"of transformers; leave remote_code out"
        )
    model_class: Any = named[0]
    values = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    described = model_class.config_class.from_dict(values)
    return module_changes(model_class, described, structure)


def module_changes(model_class: Any, config: Any, structure: Mapping[str, int]) -> Changes:
    """The changes that turn a model of a config into one with other numbers of units.

    Args:
        model_class: The class of the model.
        config: Its config.
        structure: Numbers of units by group, as :func:`hf_prune.structured.shrink.structure_of` gives them.

    Raises:
        CheckpointError: If they cannot be expressed.
    """
    with torch.device("meta"):
        built, resized, again = (model_class(copy.deepcopy(config)) for _ in range(3))
        resize(resized, structure)
        others, changes = dict(resized.named_modules()), {}
        for name, module in built.named_modules():
            if (other := others.get(name)) is not None and (change := _change(name, module, other)):
                changes[name] = change
        resize_modules(again, changes)
    if (name := _first_difference(again, resized)) is not None:
        raise _inexpressible(name)
    return changes


def _change(name: str, module: nn.Module, other: nn.Module) -> dict[str, Any]:
    values, tensors = vars(module), {**other._parameters, **other._buffers}
    attributes = {
        key: value
        for key, value in vars(other).items()
        if _is_plain(value) and not (key in values and values[key] == value and type(values[key]) is type(value))
    }
    shapes = {}
    for key, tensor in {**module._parameters, **module._buffers}.items():
        new = tensors.get(key)
        if tensor is not None and (new is None or new.shape != tensor.shape):
            if new is None or key in module._non_persistent_buffers_set:
                raise _inexpressible(f"{name}.{key}")
            shapes[key] = tuple(new.shape)
    removed = [key for key in module._modules if key not in other._modules]
    change = {"removed": removed, "tensors": shapes, "attributes": attributes}
    return {key: value for key, value in change.items() if value}


def _first_difference(model: nn.Module, expected: nn.Module) -> str | None:
    """The first module or tensor in which two models differ; None if none does."""
    # By name: a module with a parametrization has a class of its own.
    types, wanted = ({name: type(m).__qualname__ for name, m in each.named_modules()} for each in (model, expected))
    shapes, sizes = ({name: t.shape for name, t in each.state_dict().items()} for each in (model, expected))
    found: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = [(types, wanted), (shapes, sizes)]
    return next((name for a, b in found for name in {**a, **b} if a.get(name) != b.get(name)), None)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _inexpressible(name: str) -> CheckpointError:
    return CheckpointError(
        f"remote_code=True: only hf_prune can build {name} of this shrunk model; leave remote_code out"
    )
