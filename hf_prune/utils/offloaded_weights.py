"""Weights kept elsewhere: the model holds placeholders on the meta device instead.

Either hooks of the library accelerate hold them (offloaded weights), or a layer that ``hf_prune.accelerate`` gave
another kernel.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_prune.errors import PlanError


def values_of(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """Read the values of a parameter, wherever it is offloaded. The result must not be modified.

    Args:
        model: The model with the hooks of accelerate.
        name: Name of the parameter.
        parameter: The parameter, as in ``named_parameters()``.

    Raises:
        PlanError: If it was never loaded.
    """
    if not parameter.is_meta:
        return parameter.detach()
    holder, _, key = name.rpartition(".")
    module: Any = model.get_submodule(holder)
    if key == "weight" and hasattr(module, "dense_weight"):  # an accelerated layer
        weight: Tensor = module.dense_weight()
        return weight
    held = _held_by_hook(model, name)
    if held is None:
        raise PlanError(
            f"{name} is on the meta device, and no hook of accelerate holds its values: load the model's weights first"
        )
    _, weights, key = held
    tensor: Tensor = weights[key]
    return tensor


def is_offloaded(model: nn.Module, name: str) -> bool:
    """Whether a parameter is on the meta device, and a hook of accelerate holds its values."""
    return model.get_parameter(name).is_meta and _held_by_hook(model, name) is not None


def weight_of(model: nn.Module, name: str) -> Tensor:
    """A parameter, or the values of an offloaded one, on the device on which its layer runs.

    Args:
        model: The model with the hooks of accelerate.
        name: Name of the parameter.

    Raises:
        PlanError: If it was never loaded.
    """
    parameter = model.get_parameter(name)
    if not parameter.is_meta:
        return parameter
    values = values_of(model, name, parameter)
    hook, _, _ = _held_by_hook(model, name) or (None, None, None)
    device = getattr(hook, "execution_device", None)
    return values if device is None else values.to(device)


@torch.no_grad()
def write_weight(model: nn.Module, name: str, values: Tensor) -> None:
    """Give a parameter new values, wherever it is offloaded; it stays there.

    Values in memory are overwritten. Of values on the disk, the files stay as they are, since they may be those of a
    checkpoint: a new one is written beside them, which goes when no model reads it any more.

    Args:
        model: The model with the hooks of accelerate.
        name: Name of the parameter.
        values: Of its shape.

    Raises:
        PlanError: If it was never loaded, or the hook has no place for new values.
    """
    if not model.get_parameter(name).is_meta:
        model.get_parameter(name).copy_(values)
        return
    for other in (name, *_tied_to(model, name)):
        if (held := _held_by_hook(model, other)) is None:
            raise PlanError(f"{other} is on the meta device, and no hook of accelerate holds its values")
        _, weights, key = held
        in_memory = getattr(weights, "state_dict", weights)
        if isinstance(in_memory, dict) and key in in_memory:
            in_memory[key].copy_(values)
        elif (entry := _entry(weights, key)) is not None:
            file = _File(getattr(weights, "save_folder", None))
            save_file({key: values.detach().cpu().contiguous()}, file.path)
            dtype = str(values.dtype).removeprefix("torch.")
            new = {"safetensors_file": file.path, "weight_name": key, "dtype": dtype, "written_by_hf_prune": file}
            entry.clear()  # in place: tied weights share it
            entry.update(new)
        else:
            raise PlanError(
                f"{other} is offloaded to a {type(weights).__name__}, which has no place for new values: load the "
                f"model without offloading"
            )


def way_back(model: nn.Module, name: str) -> Callable[[], None] | None:
    """A function by which a parameter that is offloaded to the disk is read again from where it is read now.

    Args:
        model: The model with the hooks of accelerate.
        name: Name of the parameter.

    Returns:
        None if it is not on the disk.
    """
    if not model.get_parameter(name).is_meta:
        return None
    held = [_held_by_hook(model, other) for other in (name, *_tied_to(model, name))]
    entries = [_entry(one[1], one[2]) for one in held if one is not None]
    before = [(entry, dict(entry)) for entry in entries if entry is not None]

    def go_back() -> None:
        for entry, as_before in before:
            entry.clear()
            entry.update(as_before)

    return go_back if before else None


def _entry(weights: Any, key: str) -> dict[str, Any] | None:
    """What a map of offloaded weights knows of the file of one; None if it is in memory."""
    if key in getattr(weights, "state_dict", {}):
        return None
    entry = getattr(weights, "index", {}).get(key)
    return entry if isinstance(entry, dict) else None


class _File:
    """A file of weights that is deleted when the last model that reads it goes; copies of a model share it.

    Args:
        folder: Where the weights of the model are offloaded to; None for the folder of temporary files.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        place = folder if folder is not None and Path(folder).is_dir() else None
        handle, self.path = tempfile.mkstemp(".safetensors", "pruned-", place)
        os.close(handle)
        weakref.finalize(self, _delete, self.path, os.getpid())

    def __deepcopy__(self, _: object) -> _File:
        return self


def _delete(path: str, process: int) -> None:
    if os.getpid() != process:  # a fork of the process that wrote the file, and may still read it
        return
    with suppress(OSError):  # the folder may be gone already
        os.unlink(path)


def _held_by_hook(model: nn.Module, name: str) -> tuple[Any, Any, str] | None:
    """The hook of accelerate that holds an offloaded parameter, its map of weights, and the name in that; or None."""
    from accelerate.utils import PrefixedDataset

    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):  # the innermost module first
        hook: Any = getattr(model.get_submodule(".".join(parts[:depth])), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook has several
            weights, key = getattr(one, "weights_map", None), ".".join(parts[depth:])
            while isinstance(weights, PrefixedDataset):
                weights, key = weights.dataset, f"{weights.prefix}{key}"
            if weights is not None and key in weights:
                return one, weights, key
    return None


def _tied_to(model: nn.Module, name: str) -> list[str]:
    """The other names of a weight that transformers ties; offloaded, each of them may have values of its own."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    first = tied.get(name, name)
    return [other for other in dict.fromkeys([first, *(k for k, v in tied.items() if v == first)]) if other != name]


def refuse_offloaded(model: nn.Module, what: str) -> None:
    """Make sure that all weights of a model are loaded and not offloaded.

    Args:
        model: Any torch module.
        what: The function that needs them, for messages: ``"export_model()"``.

    Raises:
        PlanError: If a parameter is on the meta device.
    """
    refuse_accelerated(model, what)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise PlanError(
                f"{name} is on the meta device (offloaded or not loaded), where {what} does not reach it: load the "
                f"model without offloading, on devices with room for all of it"
            )


def refuse_accelerated(model: nn.Module, what: str) -> None:
    """Make sure that no layer of a model runs on a kernel with a copy of its weights.

    Args:
        model: Any torch module.
        what: The function that writes weights, for messages: ``"shrink()"``.

    Raises:
        PlanError: If one does.
    """
    for name, module in model.named_modules():
        if hasattr(module, "dense_weight"):
            raise PlanError(f"{name} is accelerated, with a copy of its weights: call decelerate() before {what}")
