"""Checkpoints that other tools pruned, read once and written as ours: dense files, masks, sizes in the config.

* ``weight_orig`` and ``weight_mask`` of ``torch.nn.utils.prune``;
* ``parametrizations.weight.original`` with a mask beside it, of ``torch.nn.utils.parametrize``;
* the ``sparse-bitmask`` format that ``compressed-tensors`` had up to 0.14;
* ``pruned_heads`` in configs of transformers 4, which transformers 5 does not know any more.

In place of a weight that is missing, transformers makes up random numbers. So none gets lost: what stands for a weight
and cannot be turned into one is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.checkpoint.config_file import write_config
from hf_prune.checkpoint.files import MASK_FILE, weight_files
from hf_prune.checkpoint.mask_file import save_masks
from hf_prune.checkpoint.packed.files import INDEX, SINGLE, read_index
from hf_prune.checkpoint.packed.quantization_config import structure_config
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.conversion.foreign_masks import decode
from hf_prune.errors import CheckpointError
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.utils.folders import PICKLES, copy_beside
from hf_prune.utils.json_files import read_config
from hf_prune.utils.output_folder import check_output, source_folder
from hf_prune.utils.quantization_method import METHOD

_FOREIGN = ("compression_config", "sparsity_config")  # of configs, besides quantization_config
_QUANTIZED = re.compile(r".*\.(weight_scale|weight_zero_point|weight_packed|input_scale|qweight|qzeros)")


@dataclass(frozen=True)
class MigrationReport:
    """What was carried over, and what was not.

    Args:
        masks: How many weights have a mask now.
        formats: What was found.
        heads: Heads that the config names as taken out.
        left: Files and folders that were not carried over, and tensors that are no weights.
        scaled: Weights whose mask had values besides 0 and 1, by which they were multiplied.
        unmasked: Weights that were a ``weight_orig`` without a mask, and have none now.
    """

    masks: int
    formats: tuple[str, ...]
    heads: int
    left: tuple[str, ...]
    scaled: tuple[str, ...] = ()
    unmasked: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    def __str__(self) -> str:
        lines = [f"Found: {', '.join(self.formats)}. {self.masks} weights have a mask now."]
        if self.heads:
            lines.append(f"{self.heads} heads are gone, as its config says.")
        if self.scaled:
            lines.append(
                f"Masks with values besides 0 and 1 scaled their weights, as torch.nn.utils.prune does, and now say "
                f"where those are not 0: {', '.join(self.scaled)}."
            )
        if self.unmasked:
            lines.append(f"Found without a mask, and carried over as they were: {', '.join(self.unmasked)}.")
        lines.append(f"Not carried over: {', '.join(self.left)}." if self.left else "Everything was carried over.")
        return "\n".join(lines)


def migrate_checkpoint(source: str | Path, out: str | Path, *, overwrite: bool = False) -> MigrationReport:
    """Write a checkpoint of another tool's kind as one of ours.

    Args:
        source: Its folder: ``config.json`` and safetensors; pickles are not opened.
        out: The folder for the new one: new, empty, or an earlier output.
        overwrite: Replace what is in the way in ``out``.

    Returns:
        What was carried over; print it.

    Raises:
        CheckpointError: If there is nothing of a known kind, a file is damaged or missing, all it has is a pickle, or
            weights are quantized or cannot be made of what is there; or if ``out`` is ``source``, or something is in
            the way.
    """
    source = source_folder(source)
    out = check_output(out, "migrate", [source], overwrite=overwrite)
    config = read_config(source / "config.json")
    _refuse_quantized(source, config)
    tensors: dict[str, Tensor] = {}
    files = weight_files(str(source), {})
    for file in files:
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
    if not tensors:
        pickles = [p.name for p in source.iterdir() if p.suffix in PICKLES]
        raise CheckpointError(
            f"{source} has no safetensors"
            + (f" but {', '.join(pickles)}, which are pickles and never opened: convert them first" if pickles else "")
        )
    if quantized := [name for name in tensors if _QUANTIZED.fullmatch(name)]:
        raise CheckpointError(f"{source} has quantized weights, see {quantized[0]}: dequantize them first")
    if files and Path(files[0]).name != SINGLE and (lost := set(read_index(source / INDEX)) - set(tensors)):
        raise CheckpointError(
            f"{source / INDEX} names {min(lost)}, and no file has it: download or save the checkpoint again"
        )
    found = decode(tensors, config)
    formats, left = found.formats, found.left
    heads = _heads(source, config.pop("pruned_heads", None))
    if heads:
        formats.append("pruned_heads")
    if not formats:
        raise CheckpointError(
            f"{source} has none of weight_orig and weight_mask, parametrizations, sparse-bitmask weights or "
            f"pruned_heads: it needs no migration, or is of a kind that is not known; zeros without masks become masks "
            f"with hf-prune migrate --adopt-zeros"
        )
    for key in _FOREIGN:
        config.pop(key, None)
    if heads:
        config["quantization_config"] = structure_config(_structure(config, heads))
    elif (config.get("quantization_config") or {}).get("quant_method") != METHOD:
        config.pop("quantization_config", None)
    with staged_checkpoint(out, "migrate", overwrite=overwrite) as staging:
        save_file({n: t.contiguous() for n, t in found.weights.items()}, staging / SINGLE, {"format": "pt"})
        if found.masks:
            save_masks(MaskStore(found.masks), staging / MASK_FILE)
        write_config(staging, config)
        own = ("config.json", INDEX, *(Path(file).name for file in files))
        left += copy_beside(source, staging, own, ["model*.safetensors", MASK_FILE])
    gone = sum(map(len, heads.values()))
    return MigrationReport(
        len(found.masks), tuple(formats), gone, tuple(left), tuple(found.scaled), tuple(found.unmasked)
    )


def _refuse_quantized(source: Path, config: Mapping[str, Any]) -> None:
    """Make sure that a config speaks of no more than sparsity."""
    for key in ("quantization_config", *_FOREIGN):
        found = config.get(key) or {}
        if not isinstance(found, dict):
            raise CheckpointError(f"the {key} of {source} is {found!r}: expected an object; the file is damaged")
        method = found.get("quant_method", "compressed-tensors")
        if method == METHOD and (found.get("compressed") is not None or config.get("pruned_heads")):
            raise CheckpointError(f"{source} is a checkpoint of hf_prune already: it needs no migration")
        if method == METHOD:
            continue
        if method != "compressed-tensors" or found.get("config_groups") or found.get("kv_cache_scheme"):
            raise CheckpointError(
                f"{source} is quantized with {method!r}, as the {key} says: only sparsity can be carried over; "
                f"dequantize it first"
            )
        sparsity = found if key == "sparsity_config" else found.get("sparsity_config") or {}
        kind = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
        if kind not in (None, "dense", "sparse-bitmask"):
            raise CheckpointError(
                f"{source} has weights in the format {kind!r}, as the {key} says: expected sparse-bitmask; decompress "
                f"it with compressed-tensors first"
            )


def _heads(source: Path, found: Any) -> dict[int, list[int]]:
    """Heads that are gone, by layer."""
    try:
        return {int(layer): [int(head) for head in gone] for layer, gone in (found or {}).items() if gone}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"pruned_heads in the config of {source} is {found!r}: expected numbers of heads by layer"
        ) from error


def _structure(config: Mapping[str, Any], heads: Mapping[int, list[int]]) -> dict[str, int]:
    """How many heads each attention has left."""
    from transformers import AutoConfig, AutoModel

    settings = dict(copy.deepcopy(config))
    kind = settings.pop("model_type", None)
    settings.pop("quantization_config", None)
    if kind is None:
        raise CheckpointError("config.json names no model_type, so where its heads are is not known")
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.for_model(kind, **settings), trust_remote_code=False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json describes no model that transformers knows: {error}") from error
    found = {}
    for site in find_unit_groups(model):
        layer = site.layers[0][1] if site.layers else -1
        if site.kind == "head" and layer in heads:
            if not all(0 <= head < site.units for head in heads[layer]):
                raise CheckpointError(
                    f"pruned_heads has {heads[layer]} for layer {layer}: expected numbers below {site.units}"
                )
            found[site.name] = site.units - len(set(heads[layer]))
    if len(found) != len(heads):
        raise CheckpointError(
            f"pruned_heads names the layers {sorted(heads)}, and attentions were found for {len(found)} of them: a "
            f"model with two stacks of layers cannot be migrated"
        )
    return found
