"""Tensors that stand in for unknown values: whatever is computed from one is tainted too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Functions that read the shape and storage of a tensor, and never its values.
_METADATA = frozenset(
    "size dim ndimension numel nelement stride element_size storage_offset untyped_storage data_ptr get_device type "
    "is_floating_point is_complex is_signed is_contiguous is_inference is_same_size is_conj is_neg __len__ __hash__ "
    "__repr__ __format__ __get__".split()
)
# Functions whose result has a shape that depends on values.
_SIZED_BY_VALUES = frozenset(
    "nonzero argwhere masked_select unique unique_consecutive bincount repeat_interleave".split()
)


# Operators that write into their first operand; functions that do so end with one underscore.
_IN_PLACE = frozenset(
    f"__{name}__" for name in "set setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor".split()
)


class TaintedError(Exception):
    """A branch or a shape depends on a tainted value, or one is written elsewhere; never leaves the package."""


class Tainted(Tensor):
    """A tensor whose values are unknown, of the shape and dtype of the tensor that it stands in for.

    Everything computed from it is tainted, comparisons and indices included, so that it is recognised wherever it
    arrives. Uses that would leave no trace are errors: to branch on a value, to let a shape depend on one, and to write
    one into another tensor.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute as usual, and check that the result carries the taint.

        Raises:
            TaintedError: If it does not.
        """
        name, kwargs = func.__name__, kwargs or {}
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if kwargs.get("out") is not None or (in_place and not isinstance(args[0], Tainted)):
            raise TaintedError(f"{name} writes into another tensor")
        if name in _SIZED_BY_VALUES or (name == "__getitem__" and _picks(args[1])):
            raise TaintedError(f"{name} returns a shape that depends on values")
        result = super().__torch_function__(func, types, args, kwargs)
        if name not in _METADATA and not _is_tensors(result):
            raise TaintedError(f"{name} reads values")
        return result


def _picks(index: Any) -> bool:
    """Whether an index holds a tainted mask, whose values decide how many elements are picked."""
    parts = index if isinstance(index, tuple | list) else (index,)
    return any(isinstance(part, Tainted) and part.dtype in (torch.bool, torch.uint8) for part in parts)


def _is_tensors(result: Any) -> bool:
    if isinstance(result, tuple | list):
        return not isinstance(result, torch.Size) and all(map(_is_tensors, result))
    return result is None or isinstance(result, Tensor)


def tainted(value: Any) -> Any:
    """Replace a tensor by a tainted one, filled with NaN where its dtype has it; return anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    stand_in = torch.full_like(value, torch.nan) if value.is_floating_point() else value.clone()
    return stand_in.as_subclass(Tainted)
