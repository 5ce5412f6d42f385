"""Weights and masks as other tools stored them."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_prune.checkpoint.sources import class_of_transformers
from hf_prune.errors import CheckpointError
from hf_prune.pruning.torch_prune import masked_weight

_PRUNE = "torch.nn.utils.prune"
_TORCH = re.compile(r"(.+)_orig")
_PARAMETRIZED = re.compile(r"(.+)\.parametrizations\.(\w+)\.original")
_BITMASK = ("bitmask", "compressed", "row_offsets", "shape")
_MASK = re.compile(r"(.+)_mask")
_PARAMETRIZATION = re.compile(r"(.+)\.parametrizations\.(\w+)\..+")
_BITMASK_PART = re.compile(r"(.+)\.(bitmask|compressed|row_offsets)")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class _Decoded:
    """Plain weights, masks, the formats that were found, and what became of the tensors that are neither."""

    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    formats: list[str]
    scaled: list[str]
    unmasked: list[str]
    left: list[str]


def decode(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> _Decoded:
    """What tensors stand for.

    Raises:
        CheckpointError: If some stand for a weight that cannot be made of them.
    """
    rest, found = dict(tensors), _Decoded({}, {}, [], [], [], [])

    def take(name: str, weight: Tensor, mask: Tensor, kind: str) -> None:
        _check_float(name, weight)
        found.weights[name], found.masks[name] = masked_weight(name, weight, mask)
        if not bool(((mask == 0) | (mask == 1)).all()):
            if kind != _PRUNE:
                raise CheckpointError(
                    f"the mask of {name} has values besides 0 and 1, and how its parametrization uses them is not "
                    f"known: bake it in first, with remove_parametrizations"
                )
            found.scaled.append(name)
        if kind not in found.formats:
            found.formats.append(kind)

    for key in list(tensors):
        if (match := _TORCH.fullmatch(key)) and f"{match[1]}_mask" in rest:
            take(match[1], rest.pop(key), rest.pop(f"{match[1]}_mask"), _PRUNE)
        elif match := _PARAMETRIZED.fullmatch(key):
            base = f"{match[1]}.parametrizations.{match[2]}."
            if [k for k in rest if k.startswith(base) and k != key] == [f"{base}0.mask"]:  # alone, and the first one
                take(f"{match[1]}.{match[2]}", rest.pop(key), rest.pop(f"{base}0.mask"), "parametrizations")
        elif key.endswith(".bitmask") and all(f"{key[:-8]}.{part}" in rest for part in _BITMASK):
            parts = {part: rest.pop(f"{key[:-8]}.{part}") for part in _BITMASK}
            weight, mask = _from_bitmask(key[:-8], parts)
            take(key[:-8], weight, mask, "sparse-bitmask")
    _settle(rest, found, config)
    found.weights = {**rest, **found.weights}
    return found


def _settle(rest: dict[str, Tensor], found: _Decoded, config: Mapping[str, Any]) -> None:
    """Take out of the other tensors what is stored as pruning tools do and is incomplete.

    Raises:
        CheckpointError: If it stands for a weight that cannot be made of it.
    """
    kinds = (_TORCH, _MASK, _PARAMETRIZATION, _BITMASK_PART)
    odd = {key: match for key in sorted(rest) for kind in kinds if (match := kind.fullmatch(key))}
    own = _own_names(config) if odd else set()  # weight_norm of transformers' own is a parametrization, for one
    for key, match in odd.items():
        if key in own:
            continue
        kind, tensor = match.re, rest.pop(key)
        name = f"{match[1]}.{match[2]}" if kind is _PARAMETRIZATION else match[1]
        if name in rest or name in found.weights:
            found.left.append(key)
        elif kind is _TORCH and f"{name}_u" not in rest:
            _check_float(name, tensor)
            found.weights[name] = tensor
            found.unmasked.append(name)
            if _PRUNE not in found.formats:
                found.formats.append(_PRUNE)
        elif kind is _MASK and name not in own and name.rpartition(".")[2] not in ("weight", "bias"):
            found.left.append(key)
        else:
            what = {
                _TORCH: f"is of a spectral norm, as {name}_u says: expected {name}; call remove_spectral_norm",
                _MASK: f"is a mask without a weight: expected {name}_orig or {name}",
                _PARAMETRIZATION: "is of a parametrization other than one mask: bake it in first, with "
                "remove_parametrizations",
                _BITMASK_PART: f"is of a sparse-bitmask weight, and not all of {', '.join(_BITMASK)} are there",
            }[kind]
            raise CheckpointError(f"what {name} is cannot be told: {key} {what}, and save the checkpoint again")


def _own_names(config: Mapping[str, Any]) -> set[str]:
    """Names of the tensors of the model that a config describes; none if transformers cannot make it."""
    import transformers

    settings = dict(copy.deepcopy(config))
    settings.pop("quantization_config", None)
    cls = class_of_transformers(next(iter(config.get("architectures") or ()), None))
    if cls is None:
        return set()
    try:
        with torch.device("meta"):
            return set(cls(transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)).state_dict())
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError):
        return set()


def _check_float(name: str, values: Tensor) -> None:
    if values.dtype not in _FLOATS:
        raise CheckpointError(f"{name} is of type {values.dtype}, quantized: expected plain weights; dequantize first")


def _from_bitmask(name: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of bits, lowest first, and the values that they mark, row by row."""
    bits, values, shape = parts["bitmask"], parts["compressed"].reshape(-1), parts["shape"].reshape(-1).tolist()
    _check_float(name, values)
    rows = math.prod(shape[:-1])
    if bits.dtype != torch.uint8 or not shape or min(shape) < 0 or tuple(bits.shape) != (rows, (shape[-1] + 7) // 8):
        raise CheckpointError(
            f"the bitmask of {name} has shape {tuple(bits.shape)} and type {bits.dtype}, for a weight of shape "
            f"{shape}: expected a byte for every eight columns; the file is damaged"
        )
    marked = np.unpackbits(bits.numpy(), axis=-1, count=shape[-1], bitorder="little").astype(bool)
    if int(marked.sum()) != values.numel():
        raise CheckpointError(
            f"{name} has {values.numel():,} values, and its bitmask marks {int(marked.sum()):,}: the file is damaged"
        )
    mask = torch.from_numpy(marked).view(shape)
    weight = torch.zeros(shape, dtype=values.dtype)
    weight[mask] = values
    return weight, mask
