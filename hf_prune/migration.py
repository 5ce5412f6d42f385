"""Checkpoints that other tools pruned, read once and written as ours: dense files, masks, sizes in the config.

* ``weight_orig`` and ``weight_mask`` of ``torch.nn.utils.prune``;
* ``parametrizations.weight.original`` with a mask beside it, of ``torch.nn.utils.parametrize``;
* the ``sparse-bitmask`` format that ``compressed-tensors`` had up to 0.14;
* ``pruned_heads`` in configs of transformers 4, which transformers 5 does not know any more.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_prune.checkpoint import MASK_FILE, save_masks, staged_checkpoint, weight_files
from hf_prune.errors import CheckpointError
from hf_prune.masking import MaskStore
from hf_prune.sites import find_sites
from hf_prune.structure import structure_config

_TORCH = re.compile(r"(.+)_orig")
_PARAMETRIZED = re.compile(r"(.+)\.parametrizations\.(\w+)\.original")
_BITMASK = ("bitmask", "compressed", "row_offsets", "shape")
_FOREIGN = ("compression_config", "sparsity_config")  # of configs, besides quantization_config
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class MigrationReport:
    """What was carried over, and what was not.

    Args:
        masks: How many weights have a mask now.
        formats: What was found.
        heads: Heads that the config names as taken out.
        left: Tensors and files that could not be carried over.
    """

    masks: int
    formats: tuple[str, ...]
    heads: int
    left: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "formats": list(self.formats), "left": list(self.left)}

    def __str__(self) -> str:
        lines = [f"Found: {', '.join(self.formats)}. {self.masks} weights have a mask now."]
        if self.heads:
            lines.append(f"{self.heads} heads are gone, as its config says.")
        lines.append(f"Not carried over: {', '.join(self.left)}." if self.left else "Everything was carried over.")
        return "\n".join(lines)


def migrate_checkpoint(source: str | Path, out: str | Path) -> MigrationReport:
    """Write a checkpoint of another tool's kind as one of ours.

    Args:
        source: Its folder: ``config.json`` and safetensors; pickles are not opened.
        out: The folder for the new one.

    Returns:
        What was carried over; print it.

    Raises:
        CheckpointError: If there is nothing of a known kind, a file is damaged, or all it has is a pickle.
    """
    source, out = Path(source), Path(out)
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} has no config.json that can be read: {error}") from error
    tensors: dict[str, Tensor] = {}
    for file in weight_files(str(source), {}):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
    if not tensors:
        pickles = [p.name for p in source.iterdir() if p.suffix in _PICKLES]
        raise CheckpointError(
            f"{source} has no safetensors"
            + (f" but {', '.join(pickles)}, which are pickles and never opened: convert them first" if pickles else "")
        )
    weights, masks, formats, left = _decode(tensors)
    heads = {int(layer): list(gone) for layer, gone in (config.pop("pruned_heads", None) or {}).items() if gone}
    if heads:
        formats.append("pruned_heads")
    if not formats:
        raise CheckpointError(
            f"{source} has none of weight_orig and weight_mask, parametrizations, sparse-bitmask weights or "
            f"pruned_heads: it needs no migration, or is of a kind that is not known"
        )
    for key in _FOREIGN:
        config.pop(key, None)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if "sparse-bitmask" in formats and method in (None, "compressed-tensors"):
        config.pop("quantization_config", None)
    if heads:
        config["quantization_config"] = structure_config(_structure(config, heads))
    with staged_checkpoint(out) as staging:
        save_file({n: t.contiguous() for n, t in weights.items()}, staging / "model.safetensors", {"format": "pt"})
        if masks:
            save_masks(MaskStore(masks), staging / MASK_FILE)
        (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in sorted(source.iterdir()):
            known = path.name == "config.json" or path.name.startswith("model") or path.name == MASK_FILE
            if path.is_file() and not known and path.suffix not in _PICKLES:
                shutil.copyfile(path, staging / path.name)
            elif path.is_dir() or path.suffix in _PICKLES:
                left.append(path.name)
    return MigrationReport(len(masks), tuple(formats), sum(map(len, heads.values())), tuple(left))


def _decode(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str], list[str]]:
    """Plain weights, masks, the formats that were found, and what is left over."""
    rest, weights, masks, formats = dict(tensors), {}, {}, []

    def take(name: str, weight: Tensor, mask: Tensor, kind: str) -> None:
        if mask.shape != weight.shape:
            raise CheckpointError(
                f"the mask of {name} has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}: expected the same"
            )
        masks[name], weights[name] = mask.bool(), weight.masked_fill(~mask.bool(), 0)
        if kind not in formats:
            formats.append(kind)

    for key in list(tensors):
        if (match := _TORCH.fullmatch(key)) and f"{match[1]}_mask" in rest:
            take(match[1], rest.pop(key), rest.pop(f"{match[1]}_mask"), "torch.nn.utils.prune")
        elif match := _PARAMETRIZED.fullmatch(key):
            base = f"{match[1]}.parametrizations.{match[2]}."
            found = [k for k in rest if re.fullmatch(re.escape(base) + r"\d+\.mask", k)]
            if len(found) == 1:
                take(f"{match[1]}.{match[2]}", rest.pop(key), rest.pop(found[0]), "parametrizations")
        elif key.endswith(".bitmask") and all(f"{key[:-8]}.{part}" in rest for part in _BITMASK):
            parts = {part: rest.pop(f"{key[:-8]}.{part}") for part in _BITMASK}
            weight, mask = _from_bitmask(key[:-8], parts)
            take(key[:-8], weight, mask, "sparse-bitmask")
    odd = re.compile(r".*(_orig|_mask|\.bitmask|\.compressed|\.row_offsets)|.*\.parametrizations\..*")
    left = sorted(key for key in rest if odd.fullmatch(key))
    return {**{k: t for k, t in rest.items() if k not in left}, **weights}, masks, formats, left


def _from_bitmask(name: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of bits, lowest first, and the values that they mark, row by row."""
    shape = [int(n) for n in parts["shape"].tolist()]
    bits, values = parts["bitmask"], parts["compressed"]
    rows = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
    if bits.dtype != torch.uint8 or not shape or tuple(bits.shape) != (rows, (shape[-1] + 7) // 8):
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


def _structure(config: Mapping[str, Any], heads: Mapping[int, list[int]]) -> dict[str, int]:
    """How many heads each attention has left."""
    from transformers import AutoConfig, AutoModel

    settings = dict(copy.deepcopy(config))
    kind = settings.pop("model_type", None)
    settings.pop("quantization_config", None)
    if kind is None:
        raise CheckpointError("config.json names no model_type, so where its heads are is not known")
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
    found = {}
    for site in find_sites(model):
        layer = site.layers[0][1] if site.layers else -1
        if site.kind == "head" and layer in heads:
            found[site.name] = site.units - len(set(heads[layer]))
    if len(found) != len(heads):
        raise CheckpointError(
            f"pruned_heads names the layers {sorted(heads)}, and attentions were found for {len(found)} of them: a "
            f"model with two stacks of layers cannot be migrated"
        )
    return found
