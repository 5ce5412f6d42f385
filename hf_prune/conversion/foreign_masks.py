"""Decode the weights and masks that other pruning tools stored."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
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
class DecodedTensors:
    """Plain weights and their masks, the formats that were found, and the names of special cases.

    Args:
        weights: Plain tensors by name.
        masks: Masks by weight name.
        formats: Names of the formats.
        scaled: Weights that were multiplied by a mask with values other than 0 and 1.
        unmasked: Weights stored for pruning without a mask.
        left_out: Tensors that are not weights.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    formats: list[str] = field(default_factory=list)
    scaled: list[str] = field(default_factory=list)
    unmasked: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def decode(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> DecodedTensors:
    """Turn the tensors of a checkpoint into plain weights and masks.

    Args:
        tensors: All tensors of the checkpoint, by name.
        config: The content of ``config.json``.

    Raises:
        CheckpointError: If tensors stand for a weight that cannot be recovered from them.
    """
    rest, decoded = dict(tensors), DecodedTensors()

    def take(name: str, weight: Tensor, mask: Tensor, kind: str) -> None:
        _check_float(name, weight)
        decoded.weights[name], decoded.masks[name] = masked_weight(name, weight, mask)
        if not bool(((mask == 0) | (mask == 1)).all()):
            if kind != _PRUNE:
                raise CheckpointError(
                    f"the mask of {name} has values other than 0 and 1, and how its parametrization uses them is not "
                    f"known: make it permanent first, with remove_parametrizations"
                )
            decoded.scaled.append(name)
        if kind not in decoded.formats:
            decoded.formats.append(kind)

    for key in list(tensors):
        if (match := _TORCH.fullmatch(key)) and f"{match[1]}_mask" in rest:
            take(match[1], rest.pop(key), rest.pop(f"{match[1]}_mask"), _PRUNE)
        elif match := _PARAMETRIZED.fullmatch(key):
            base = f"{match[1]}.parametrizations.{match[2]}."
            if [k for k in rest if k.startswith(base) and k != key] == [f"{base}0.mask"]:  # the only parametrization
                take(f"{match[1]}.{match[2]}", rest.pop(key), rest.pop(f"{base}0.mask"), "parametrizations")
        elif key.endswith(".bitmask") and all(f"{key[:-8]}.{part}" in rest for part in _BITMASK):
            parts = {part: rest.pop(f"{key[:-8]}.{part}") for part in _BITMASK}
            weight, mask = _from_bitmask(key[:-8], parts)
            take(key[:-8], weight, mask, "sparse-bitmask")
    _decode_incomplete(rest, decoded, config)
    decoded.weights = {**rest, **decoded.weights}
    return decoded


def _decode_incomplete(rest: dict[str, Tensor], decoded: DecodedTensors, config: Mapping[str, Any]) -> None:
    """Move tensors with names of pruning tools that are not a complete set from ``rest`` to the result.

    Raises:
        CheckpointError: If they stand for a weight that cannot be recovered.
    """
    kinds = (_TORCH, _MASK, _PARAMETRIZATION, _BITMASK_PART)
    suspects = {key: match for key in sorted(rest) for kind in kinds if (match := kind.fullmatch(key))}
    # Some models have such names themselves: weight_norm in transformers is a parametrization.
    regular = _state_names(config) if suspects else set()
    for key, match in suspects.items():
        if key in regular:
            continue
        kind, tensor = match.re, rest.pop(key)
        name = f"{match[1]}.{match[2]}" if kind is _PARAMETRIZATION else match[1]
        if name in rest or name in decoded.weights:
            decoded.left_out.append(key)
        elif kind is _TORCH and f"{name}_u" not in rest:
            _check_float(name, tensor)
            decoded.weights[name] = tensor
            decoded.unmasked.append(name)
            if _PRUNE not in decoded.formats:
                decoded.formats.append(_PRUNE)
        elif kind is _MASK and name not in regular and name.rpartition(".")[2] not in ("weight", "bias"):
            decoded.left_out.append(key)
        else:
            problem = {
                _TORCH: f"belongs to a spectral norm, as {name}_u shows: expected {name}; call remove_spectral_norm",
                _MASK: f"is a mask without a weight: expected {name}_orig or {name}; add it",
                _PARAMETRIZATION: "belongs to a parametrization that is not a single mask: make it permanent first, "
                "with remove_parametrizations",
                _BITMASK_PART: f"belongs to a sparse-bitmask weight without one of {', '.join(_BITMASK)}: add it",
            }[kind]
            raise CheckpointError(f"{name} cannot be recovered: {key} {problem}, and save the checkpoint again")


def _state_names(config: Mapping[str, Any]) -> set[str]:
    """The names in the state dict of the model that a config describes; empty if transformers cannot build it."""
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
        raise CheckpointError(f"{name} has the quantized type {values.dtype}: expected plain weights; dequantize first")


def _from_bitmask(name: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The weight and mask from rows of bits, lowest bit first, and the values that they mark, row by row."""
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
