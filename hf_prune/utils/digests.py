"""SHA-256 digests of tensors and batches, by names, dtypes, shapes and bytes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The first 16 digits of the digest of named tensors, in their order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        for part in _parts(name, tensor):
            digest.update(part)
    return digest.hexdigest()[:16]


def examples_digest(examples: Iterable[Mapping[str, Any]] | None) -> str | None:
    """The :func:`tensors_digest` of examples or batches of numbers, in their order; None if there are none."""
    if examples is None:
        return None
    named = ((f"{i}.{key}", value) for i, example in enumerate(examples) for key, value in sorted(example.items()))
    return tensors_digest((name, torch.as_tensor(value)) for name, value in named)


def batches_digest(batches: Iterable[Any]) -> str:
    """The digest of batches, in their order; the order of the names in a batch does not matter."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()) if isinstance(batch, Mapping) else [("", batch)]:
            if isinstance(value, Tensor):
                for part in _parts(name, value):
                    digest.update(part)
            else:  # an address in memory is another one in every process
                digest.update(f"{name} {type(value).__name__} {_ADDRESS.sub('', repr(value))}".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _parts(name: str, tensor: Tensor) -> Iterable[Any]:
    """Name, dtype and shape of a tensor, and its bytes."""
    yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
    yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
