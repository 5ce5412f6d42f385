"""Which tokens the rows of a tensor are, where a router has gathered them: followed while a model runs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_KEEPS_ROWS = 2  # tensors with at least so many dimensions have rows


class RoutedRows:
    """Follows rows from where they are gathered through everything that keeps their number and order.

    A row is known by the number of rows that it was gathered from, and its place among them: padding is then told from
    tokens as if nothing had been gathered. Rows that are joined one after the other stay known; transposing ends it.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def clear(self) -> None:
        """Forget everything: a batch begins."""
        self._known.clear()

    def of(self, x: Tensor) -> tuple[int, Tensor] | None:
        """The number of rows that those of ``x`` were gathered from, and (rows,) their places; None if they were not.

        Args:
            x: (..., features), whose rows are meant one after the other.
        """
        known = self._known.get(id(x))
        return None if known is None or known[0]() is not x else known[1:]

    def note(self, x: Tensor, size: int, places: Tensor) -> None:
        """Say where rows come from.

        Args:
            x: (..., features).
            size: The number of rows that they were gathered from.
            places: (rows,) places among them.
        """
        key = id(x)
        self._known[key] = (weakref.ref(x, lambda _: self._known.pop(key, None)), size, places)

    def follow(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """See a function of torch that has returned.

        Args:
            name: Its name.
            args: Its arguments.
            kwargs: Its keyword arguments.
            result: What it returned.
        """
        if name in ("cat", "concat", "concatenate") and args:
            self._join(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0), result)
        if not args or not isinstance(args[0], Tensor) or args[0].dim() < _KEEPS_ROWS:
            return
        source = args[0]
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            first = next((part for part in index if part is not None), None)
            self._gather(source, first, result)
        elif name == "index_select" and (args[1] if len(args) > 1 else kwargs.get("dim")) == 0:
            self._gather(source, args[2] if len(args) > 2 else kwargs.get("index"), result)
        elif name in ("split", "chunk", "tensor_split"):
            self._divide(source, result)
        elif isinstance(result, Tensor) and result.dim() >= _KEEPS_ROWS and name not in _REORDERS:
            known = self.of(source)
            if known is not None and _rows(result) == len(known[1]):
                self.note(result, *known)

    def _join(self, parts: Any, dim: Any, result: Any) -> None:
        """Rows of several experts, one after the other; those without any say nothing."""
        known = [self.of(part) for part in parts if part.numel()]
        found = [entry for entry in known if entry is not None]
        if dim == 0 and found and len(found) == len(known) and len({size for size, _ in found}) == 1:
            places = torch.cat([places.reshape(-1) for _, places in found])
            if result.dim() == _KEEPS_ROWS and len(result) == len(places):
                self.note(result, found[0][0], places)

    def _divide(self, source: Tensor, parts: Any) -> None:
        known = self.of(source)
        if known is None or not isinstance(parts, tuple | list):
            return
        counts = [_rows(part) for part in parts]
        if sum(counts) == len(known[1]):  # along the rows
            for part, places in zip(parts, known[1].split(counts), strict=True):
                self.note(part, known[0], places)
        elif set(counts) == {len(known[1])}:  # along the features
            for part in parts:
                self.note(part, *known)

    def _gather(self, source: Tensor, index: Any, result: Any) -> None:
        known = self.of(source)
        if not isinstance(result, Tensor) or result.dim() < _KEEPS_ROWS or source.dim() > _KEEPS_ROWS:
            return
        if isinstance(index, Tensor) and index.dim() == 1:
            if index.dtype == torch.bool:
                index = index.nonzero().squeeze(1)
            if _rows(result) == len(index):
                places = index if known is None else known[1][index.to(known[1].device)]
                self.note(result, len(source) if known is None else known[0], places)
        elif known is not None and isinstance(index, slice | type(...)):
            places = known[1][index] if isinstance(index, slice) else known[1]
            if _rows(result) == len(places):
                self.note(result, known[0], places)


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


_REORDERS = frozenset(
    "sort flip roll cat stack t transpose permute swapaxes movedim rot90 gather scatter __get__".split()
)
