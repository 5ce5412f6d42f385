"""The choice of kernels in a file, if it is for this model and this machine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hf_prune.errors import KernelError
from hf_prune.inference.acceleration.kernels import (
    SPARSITY_STEPS,
    is_kernel,
    name_of,
    precision_of,
    stepped_sparsity_of,
)
from hf_prune.inference.acceleration.layer_kinds import LayerKind
from hf_prune.inference.acceleration.machine import this_machine
from hf_prune.inference.acceleration.observe import matrix_of
from hf_prune.inference.acceleration.report import read_choices

_ANEW = "leave saved out, to choose anew"


def saved_kinds(
    saved: str | os.PathLike[str], layers: Mapping[str, nn.Module], dtypes: Sequence[str]
) -> list[LayerKind]:
    """The kinds of layers in a file, with the zeros that are counted here.

    Args:
        saved: The file.
        layers: The layers of the model, by name.
        dtypes: Precisions that are allowed besides that of each layer.

    Raises:
        CheckpointError: If it cannot be read.
        KernelError: If it is for another machine or model, or names a kernel that is not allowed.
    """
    kinds, machine = read_choices(saved)
    _check_machine(saved, machine)
    found = []
    for kind in kinds:
        by_sparsity: dict[float, list[str]] = {}
        for name in kind.layers:
            if name not in layers:
                raise KernelError(
                    f"{saved} is for another model: it has a layer {name} of shape {kind.shape}, and here there is "
                    f"none; {_ANEW}"
                )
            weight = matrix_of(layers[name])
            _check_layer(saved, name, kind, weight)
            by_sparsity.setdefault(stepped_sparsity_of(weight), []).append(name)
        for choice in kind.choices:
            if not is_kernel(choice.kernel, kind.dtype):
                raise KernelError(f"{saved} chose {choice.kernel!r}, and {kind.dtype} has no such kernel: {_ANEW}")
            if precision_of(choice.kernel) not in (None, *dtypes):
                raise KernelError(f"{saved} chose {choice.kernel}: allow it with dtypes, or {_ANEW}")
        found += [
            dataclasses.replace(kind, layers=tuple(names), sparsity=sparsity) for sparsity, names in by_sparsity.items()
        ]
    return found


def _check_machine(saved: str | os.PathLike[str], machine: Mapping[str, str]) -> None:
    here = this_machine()
    different = [key for key in here if machine.get(key) != here[key]]
    if not different:
        return
    threads = machine.get("threads", "")
    matches = different == ["threads"] and threads.isascii() and threads.isdecimal()
    raise KernelError(
        f"{saved} is for {', '.join(f'{key} {machine.get(key)}' for key in different)}, and this is "
        f"{', '.join(f'{key} {here[key]}' for key in different)}: "
        f"{f'call torch.set_num_threads({threads}) first, or ' if matches else ''}leave saved out, to choose for this "
        f"machine"
    )


def _check_layer(saved: str | os.PathLike[str], name: str, kind: LayerKind, weight: Tensor) -> None:
    """Shares of zeros may be one step apart, as those of two prunings of one model are."""
    shape, dtype, sparsity = tuple(weight.shape), name_of(weight.dtype), stepped_sparsity_of(weight)
    if (shape, dtype) == (kind.shape, kind.dtype) and abs(sparsity - kind.sparsity) < 1.5 / SPARSITY_STEPS:
        return
    raise KernelError(
        f"{saved} is for another model: its layer {name} is of shape {kind.shape} in {kind.dtype} with "
        f"{100 * kind.sparsity:.0f} % zeros, and here it is {shape} in {dtype} with {100 * sparsity:.0f} %; {_ANEW}"
    )
