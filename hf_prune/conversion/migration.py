"""Migrate checkpoints that other tools pruned to dense weights, masks, and sizes in the config.

* ``weight_orig`` and ``weight_mask`` of ``torch.nn.utils.prune``;
* ``parametrizations.weight.original`` with a mask beside it, of ``torch.nn.utils.parametrize``;
* the ``sparse-bitmask`` format of ``compressed-tensors`` up to 0.14;
* ``pruned_heads`` in configs of transformers 4, which transformers 5 does not support.

transformers initializes missing weights randomly, so no weight may get lost: stored tensors that stand for a weight but
cannot be converted are refused.
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
from hf_prune.checkpoint.files import INDEX, MASK_FILE, SINGLE, read_index, weight_files
from hf_prune.checkpoint.mask_file import save_masks
from hf_prune.checkpoint.packed.quantization_config import structure_config
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.conversion.foreign_masks import decode
from hf_prune.errors import CheckpointError
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.utils.folders import PICKLES, copy_beside
from hf_prune.utils.json_files import read_config, write_config
from hf_prune.utils.output_folder import check_output, source_folder
from hf_prune.utils.progress import working
from hf_prune.utils.quantization_method import METHOD
from hf_prune.utils.results import Result

_FOREIGN = ("compression_config", "sparsity_config")  # keys of configs, besides quantization_config
_QUANTIZED = re.compile(r".*\.(weight_scale|weight_zero_point|weight_packed|input_scale|qweight|qzeros)")


@dataclass(frozen=True, repr=False)
class MigrationReport(Result):
    """What was migrated, and what was not. Print it.

    Args:
        masks: Number of weights that have a mask now.
        formats: The formats that were found.
        heads: Number of heads that the config names as removed.
        left: Files and folders that were not copied, and tensors that are not weights.
        scaled: Weights whose mask had values other than 0 and 1, which they were multiplied by.
        unmasked: Weights from a ``weight_orig`` without a mask, which have no mask now.
    """

    bars = ("masks", "heads")

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
            lines.append(f"{self.heads} heads are removed, as the config says.")
        if self.scaled:
            lines.append(
                f"Masks with values other than 0 and 1 scaled their weights, as in torch.nn.utils.prune, and keep "
                f"those that are not 0: {', '.join(self.scaled)}."
            )
        if self.unmasked:
            lines.append(f"Migrated without a mask, since there was none: {', '.join(self.unmasked)}.")
        lines.append(f"Not migrated: {', '.join(self.left)}." if self.left else "Everything was migrated.")
        return "\n".join(lines)


@working("Migrating")
def migrate_checkpoint(source: str | Path, out: str | Path, *, overwrite: bool = False) -> MigrationReport:
    """Migrate a checkpoint that another tool pruned.

    Args:
        source: Its folder, with ``config.json`` and safetensors files; pickles are not opened.
        out: The folder to write: new, empty, or an earlier output.
        overwrite: Replace existing files in ``out``.

    Returns:
        What was migrated; print it.

    Raises:
        CheckpointError: If no known format is found; if a file is damaged or missing, or the only weights are pickles;
            if weights are quantized or cannot be recovered; or if ``out`` is ``source``, or something is in the way.
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
    decoded = decode(tensors, config)
    formats, left_out = decoded.formats, decoded.left_out
    heads = _removed_heads(source, config.pop("pruned_heads", None))
    if heads:
        formats.append("pruned_heads")
    if not formats:
        raise CheckpointError(
            f"{source} has none of weight_orig and weight_mask, parametrizations, sparse-bitmask weights or "
            f"pruned_heads: it needs no migration, or has an unknown format; zeros without masks become masks with "
            f"hf-prune migrate --adopt-zeros"
        )
    for key in _FOREIGN:
        config.pop(key, None)
    if heads:
        config["quantization_config"] = structure_config(_remaining_heads(config, heads))
    elif (config.get("quantization_config") or {}).get("quant_method") != METHOD:
        config.pop("quantization_config", None)
    with staged_checkpoint(out, "migrate", overwrite=overwrite) as staging:
        save_file({n: t.contiguous() for n, t in decoded.weights.items()}, staging / SINGLE, {"format": "pt"})
        if decoded.masks:
            save_masks(MaskStore(PackedMasks(decoded.masks)), staging / MASK_FILE)
        write_config(staging, config)
        rewritten = ("config.json", INDEX, *(Path(file).name for file in files))
        left_out += copy_beside(source, staging, rewritten, ["model*.safetensors", MASK_FILE])
    return MigrationReport(
        masks=len(decoded.masks),
        formats=tuple(formats),
        heads=sum(map(len, heads.values())),
        left=tuple(left_out),
        scaled=tuple(decoded.scaled),
        unmasked=tuple(decoded.unmasked),
    )


def _refuse_quantized(source: Path, config: Mapping[str, Any]) -> None:
    """Make sure that a config describes sparsity and no quantization."""
    for key in ("quantization_config", *_FOREIGN):
        settings = config.get(key) or {}
        if not isinstance(settings, dict):
            raise CheckpointError(f"the {key} of {source} is {settings!r}: expected an object; the file is damaged")
        method = settings.get("quant_method", "compressed-tensors")
        if method == METHOD and (settings.get("compressed") is not None or config.get("pruned_heads")):
            raise CheckpointError(f"{source} is a checkpoint of hf_prune already: it needs no migration")
        if method == METHOD:
            continue
        if method != "compressed-tensors" or settings.get("config_groups") or settings.get("kv_cache_scheme"):
            raise CheckpointError(
                f"{source} is quantized with {method!r}, as the {key} says: only sparsity can be migrated; dequantize "
                f"it first"
            )
        sparsity = settings if key == "sparsity_config" else settings.get("sparsity_config") or {}
        kind = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
        if kind not in (None, "dense", "sparse-bitmask"):
            raise CheckpointError(
                f"{source} has weights in the format {kind!r}, as the {key} says: expected sparse-bitmask; decompress "
                f"it with compressed-tensors first"
            )


def _removed_heads(source: Path, value: Any) -> dict[int, list[int]]:
    """The removed heads of each layer, from ``pruned_heads``."""
    try:
        return {int(layer): [int(head) for head in heads] for layer, heads in (value or {}).items() if heads}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"pruned_heads in the config of {source} is {value!r}: expected numbers of heads by layer"
        ) from error


def _remaining_heads(config: Mapping[str, Any], heads: Mapping[int, list[int]]) -> dict[str, int]:
    """The number of remaining heads of each attention with removed ones."""
    from transformers import AutoConfig, AutoModel

    settings = dict(copy.deepcopy(config))
    kind = settings.pop("model_type", None)
    settings.pop("quantization_config", None)
    if kind is None:
        raise CheckpointError("config.json names no model_type, so the places of its heads are not known")
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.for_model(kind, **settings), trust_remote_code=False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json describes no model that transformers knows: {error}") from error
    remaining = {}
    for group in find_unit_groups(model):
        layer = group.layers[0][1] if group.layers else -1
        if group.kind == "head" and layer in heads:
            if not all(0 <= head < group.units for head in heads[layer]):
                raise CheckpointError(
                    f"pruned_heads has {heads[layer]} for layer {layer}: expected numbers below {group.units}"
                )
            remaining[group.name] = group.units - len(set(heads[layer]))
    if len(remaining) != len(heads):
        raise CheckpointError(
            f"pruned_heads names the layers {sorted(heads)}, and attentions were found for {len(remaining)} of them: a "
            f"model with two stacks of layers cannot be migrated"
        )
    return remaining
