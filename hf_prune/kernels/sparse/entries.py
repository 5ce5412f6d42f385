"""What the formats of sparse matrices share: their entries, and checks of what they are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Checked:
    """A format whose ``__post_init__`` checks its tensors: also of one that was copied or unpickled."""

    def __post_init__(self) -> None:
        """Make sure that no entry points outside of the matrix.

        Raises:
            ValueError: If one does.
        """
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()


class Entries(NamedTuple):
    """The entries of a matrix that are not zero, row by row: all (nonzero,)."""

    rows: Tensor
    columns: Tensor
    values: Tensor


def kept_entries(weight: Tensor) -> Entries:
    """The entries of a matrix that are not zero, of either sign."""
    rows, columns = weight.detach().nonzero(as_tuple=True)
    return Entries(rows, columns, weight.detach()[rows, columns])


def starts_of(counts: Tensor) -> Tensor:
    """(parts + 1,) int32: where each part begins, given how long they are."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.to(torch.int64)]).cumsum(0).to(torch.int32)


def unsigned(columns: Tensor) -> Tensor:
    """int64 of int16 that are to be read as unsigned."""
    return columns.to(torch.int64) & 0xFFFF


def check_weight(weight: Tensor, most_inputs: int | None = None) -> None:
    """Make sure that a weight can be put into a sparse format.

    Raises:
        ValueError: If it has another number of dimensions, dtype or device, or too many inputs.
    """
    wide = most_inputs is not None and weight.dim() == 2 and weight.shape[1] > most_inputs
    if weight.dim() != 2 or weight.dtype not in DTYPES or weight.device.type != "cpu" or wide:
        raise ValueError(
            f"found a {weight.dtype} weight of shape {tuple(weight.shape)} on {weight.device}: expected a float32, "
            f"bfloat16 or float16 matrix on the CPU{f', of at most {most_inputs} inputs' if wide else ''}"
        )


def check_tensors(values: Tensor, *others: tuple[Tensor, torch.dtype]) -> None:
    """Make sure that the tensors of a format are vectors of its dtypes.

    Args:
        values: The values.
        *others: Other tensors, with the dtypes that they must have.

    Raises:
        ValueError: If one is not.
    """
    tensors = (values, *(tensor for tensor, _ in others))
    if values.dtype not in DTYPES or any(tensor.dtype != dtype for tensor, dtype in others):
        raise ValueError(f"found dtypes {tuple(t.dtype for t in tensors)}: expected those that from_dense() gives")
    if any(t.dim() != 1 or not t.is_contiguous() or t.device.type != "cpu" for t in tensors):
        raise ValueError("found tensors that are not contiguous vectors on the CPU: expected those of from_dense()")
