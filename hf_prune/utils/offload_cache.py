"""Tensors put aside: in memory up to a budget, and beyond it in a temporary folder, bit for bit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


class OffloadCache:
    """A mapping of values made of tensors, of which no more than so many bytes are kept in memory.

    What does not fit goes into files of a temporary folder, which :meth:`close` removes. A value that replaces
    another one takes its place.

    Args:
        budget: Bytes of tensors kept in memory.
        folder: Where the temporary folder is made; that of the system if None.
    """

    def __init__(self, budget: int, folder: str | os.PathLike[str] | None = None) -> None:
        self._budget = budget
        self._parent = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._values: dict[Hashable, Any] = {}
        self._files: dict[Hashable, tuple[Path, list[Any], TreeSpec]] = {}
        self._made = 0
        self._bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values or key in self._files

    @property
    def in_memory(self) -> int:
        """Bytes of tensors in memory."""
        return self._bytes

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a copy of a value.

        Args:
            key: Its name.
            value: A tensor, or a structure of tuples, lists, dicts and model outputs with tensors in it.
        """
        self._forget(key)
        size = _size(value)
        if self._bytes + size <= self._budget:
            self._values[key] = copy_of(value)
            self._bytes += size
            self._drop_file(key)
            return
        leaves, spec = tree_flatten(value)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="hf_prune-", dir=self._parent)
        self._made += 1
        path = Path(self._folder.name) / str(self._made)
        with path.open("wb") as file:
            stored = [_write(file, leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._drop_file(key)
        self._files[key] = path, stored, spec

    def get(self, key: Hashable) -> Any:
        """A copy of a value, as it was put."""
        if key in self._values:
            return copy_of(self._values[key])
        path, stored, spec = self._files[key]
        with path.open("rb") as file:
            leaves = [_read(file, leaf) if isinstance(leaf, _Stored) else leaf for leaf in stored]
        return tree_unflatten(leaves, spec)

    def pop(self, key: Hashable) -> Any:
        """A value, as it was put, which is forgotten here."""
        value = self.get(key)
        self._forget(key)
        self._drop_file(key)
        return value

    def close(self) -> None:
        """Forget everything, and remove the folder."""
        self._values.clear()
        self._bytes = 0
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _forget(self, key: Hashable) -> None:
        if key in self._values:
            self._bytes -= _size(self._values.pop(key))

    def _drop_file(self, key: Hashable) -> None:
        if key in self._files:
            self._files.pop(key)[0].unlink()


class _Stored(NamedTuple):
    """A tensor in a file: its bytes in the order of its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device


def copy_of(value: Any) -> Any:
    """A structure whose tensors no later operation in place can reach."""
    leaves, spec = tree_flatten(value)
    return tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _size(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_flatten(value)[0] if isinstance(t, Tensor))


def raw_bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous CPU tensor, to read from and to write to."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _write(file: BinaryIO, tensor: Tensor) -> _Stored:
    dense = tensor.detach().cpu()
    if not dense.is_contiguous():
        dense = dense.clone()  # has no gaps, and keeps the order of its dimensions, on which kernels may depend
    flat = dense.as_strided((dense.numel(),), (1,))
    file.write(raw_bytes(flat))
    return _Stored(tensor.dtype, tuple(dense.shape), dense.stride(), tensor.device)


def _read(file: BinaryIO, stored: _Stored) -> Tensor:
    flat = torch.empty(torch.Size(stored.shape).numel(), dtype=stored.dtype)
    if file.readinto(raw_bytes(flat)) != flat.numel() * flat.element_size():  # type: ignore[attr-defined]
        raise OSError(f"{file.name} is shorter than it was written: the disk is full, or someone else changed it")
    return flat.as_strided(stored.shape, stored.stride).to(stored.device)
