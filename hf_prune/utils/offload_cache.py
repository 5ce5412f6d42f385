"""A tensor cache that spills to disk beyond a memory budget, bit for bit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hf_prune.utils.scratch import scratch_folder


class OffloadCache:
    """A mapping from keys to tensors, or structures of tensors, that keeps a limited number of bytes in memory.

    What does not fit is written to files in a temporary folder, which :meth:`close` removes.

    Args:
        budget: Most bytes of tensors kept in memory.
        folder: Where the temporary folder is created; None for one on a disk, see
            :func:`~hf_prune.utils.scratch.scratch_folder`.
    """

    def __init__(self, budget: int, folder: str | os.PathLike[str] | None = None) -> None:
        self._budget = budget
        self._parent = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._values: dict[Hashable, Any] = {}
        self._files: dict[Hashable, tuple[Path, list[Any], TreeSpec]] = {}
        self._file_count = 0
        self._bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values or key in self._files

    @property
    def in_memory(self) -> int:
        """Bytes of tensors in memory."""
        return self._bytes

    def put(self, key: Hashable, value: Any) -> None:
        """Store a copy of a value, in place of an earlier one with the same key.

        Args:
            key: Any hashable.
            value: A tensor, or tuples, lists, dicts and model outputs of tensors.
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
            self._folder = tempfile.TemporaryDirectory(prefix="hf_prune-", dir=self._parent or scratch_folder())
        self._file_count += 1
        path = Path(self._folder.name) / str(self._file_count)
        with path.open("wb") as file:
            stored = [_write(file, leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._drop_file(key)
        self._files[key] = path, stored, spec

    def get(self, key: Hashable) -> Any:
        """A copy of the value stored under a key."""
        if key in self._values:
            return copy_of(self._values[key])
        path, stored, spec = self._files[key]
        with path.open("rb") as file:
            leaves = [_read(file, leaf) if isinstance(leaf, _Stored) else leaf for leaf in stored]
        return tree_unflatten(leaves, spec)

    def pop(self, key: Hashable) -> Any:
        """Return and remove the value stored under a key."""
        value = self.get(key)
        self._forget(key)
        self._drop_file(key)
        return value

    def close(self) -> None:
        """Drop all values and remove the temporary folder."""
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
    """A tensor in a file, its bytes in the order of its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device


def copy_of(value: Any) -> Any:
    """Copy a structure with its tensors, so that operations in place do not reach the copy."""
    leaves, spec = tree_flatten(value)
    return tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _size(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_flatten(value)[0] if isinstance(t, Tensor))


def raw_bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous CPU tensor as a writable buffer."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _write(file: BinaryIO, tensor: Tensor) -> _Stored:
    dense = tensor.detach().cpu()
    if not dense.is_contiguous():
        dense = dense.clone()  # removes gaps but keeps the order of dimensions, on which kernels may depend
    flat = dense.as_strided((dense.numel(),), (1,))
    file.write(raw_bytes(flat))
    return _Stored(tensor.dtype, tuple(dense.shape), dense.stride(), tensor.device)


def _read(file: BinaryIO, stored: _Stored) -> Tensor:
    flat = torch.empty(torch.Size(stored.shape).numel(), dtype=stored.dtype)
    if file.readinto(raw_bytes(flat)) != flat.numel() * flat.element_size():  # type: ignore[attr-defined]
        raise OSError(f"{file.name} is shorter than written: the disk is full, or another program changed it")
    return flat.as_strided(stored.shape, stored.stride).to(stored.device)
