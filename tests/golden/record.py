"""What a golden value holds of a result, and how two of them are compared.

Masks are compared bit for bit, by SHA-256. Weights are compared by their products with fixed vectors: a hash of rounded
numbers changes whenever one of them lies next to where it is rounded, which happens on some machine in the end.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_prune import prunable
from tests.golden.builders import exact

FILE = Path(__file__).parent / "hashes.json"
DIRECTIONS = 3


def of_masks(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """How many weights go and stay, and the hash of where."""
    digest = hashlib.sha256()
    for name, mask in sorted(masks.items()):
        assert mask.dtype == torch.bool
        digest.update(f"{name} {tuple(mask.shape)}\n".encode())
        digest.update(mask.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    return {"masks": digest.hexdigest(), "kept": kept, "of": total}


def of_weights(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Names and shapes as a hash, and the weights seen from a few directions."""
    digest, norm, seen = hashlib.sha256(), 0.0, [0.0] * DIRECTIONS
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().double().reshape(-1)
        norm += float(values @ values)
        for i in range(DIRECTIONS):
            seen[i] += float(values @ exact(values.shape, zlib.crc32(f"{i} {name}".encode()), bits=10))
    zeros = sum(int((tensor == 0).sum()) for tensor in state.values())
    return {"tensors": digest.hexdigest()[:16], "zeros": zeros, "weights": [math.sqrt(norm), *seen]}


def of_model(model: Any, **facts: Any) -> dict[str, Any]:
    """A transformers model with its masks."""
    state = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):  # a layer that is switched off has no state dict
        kept = {name: tensor for name, tensor in module.named_buffers(recurse=False)}
        for name in kept.keys() - module._non_persistent_buffers_set:
            state[f"{prefix}.{name}".lstrip(".")] = kept[name]
    found = of_weights(state)
    return {**of_masks(prunable(model).masks), **found, **facts}


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def differences(expected: Any, found: Any, tolerance: float, where: str = "") -> Iterator[str]:
    """What is not the same; numbers that are no integers may differ by a share of the largest beside them."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            if key not in found or key not in expected:
                yield f"{where}/{key}: only {'now' if key in found else 'before'}"
            else:
                yield from differences(expected[key], found[key], tolerance, f"{where}/{key}")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        scale = max((abs(x) for x in expected if isinstance(x, float)), default=0.0)
        for i, (old, new) in enumerate(zip(expected, found, strict=True)):
            if isinstance(old, float) and isinstance(new, float):
                if not abs(old - new) <= tolerance * scale:
                    yield f"{where}/{i}: {old!r} before, {new!r} now"
            else:
                yield from differences(old, new, tolerance, f"{where}/{i}")
    elif isinstance(expected, float) and isinstance(found, float):
        if not abs(expected - found) <= tolerance * max(abs(expected), abs(found)):
            yield f"{where}: {expected!r} before, {found!r} now"
    elif type(expected) is not type(found) or expected != found:
        yield f"{where}: {expected!r} before, {found!r} now"
