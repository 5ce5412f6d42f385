"""Compress a dense checkpoint, tensor by tensor, in the memory of one file.

With ``pruning_masks.safetensors``, the masks become the positions of stored values, so that a kept weight that is zero
stays kept; without it, the nonzero values are stored. ``docs/format.md`` specifies the files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import convert_file_size_to_int
from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from hf_prune.checkpoint.files import INDEX, MASK_FILE, file_paths
from hf_prune.checkpoint.mask_file import StoredMasks, describe_pruning, save_masks
from hf_prune.checkpoint.module_changes import changes_of_checkpoint
from hf_prune.checkpoint.packed.files import Item, packed_item, plain_item, write_shards
from hf_prune.checkpoint.packed.format import CODECS, SPELLED, VALUES
from hf_prune.checkpoint.packed.pack import pack
from hf_prune.checkpoint.packed.quantization_config import compressed_config, is_structure
from hf_prune.checkpoint.packed.remote_code import FILE, add_remote_code, auto_classes
from hf_prune.checkpoint.packed.seal import is_packed
from hf_prune.checkpoint.shards import Entry, Shards, read_tensor
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.conversion.compression_report import CompressionReport
from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.hub.card_renewal import renew_card
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.utils.folders import copy_beside
from hf_prune.utils.json_files import read_config, write_config
from hf_prune.utils.locks import output_lock
from hf_prune.utils.output_folder import SAVE, check_output, refuse_file, source_folder
from hf_prune.utils.progress import working
from hf_prune.utils.quantization_method import METHOD
from hf_prune.utils.staging import scratch_folder

SHARD_BYTES = 5 << 30
_LEAF = "weight"
_REWRITTEN = (MASK_FILE, "config.json", INDEX, FILE)  # never copied


@working("Compressing")
def compress_checkpoint(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    codec: str = "zstd",
    values: str = "exact",
    shard_bytes: int = SHARD_BYTES,
    remote_code: bool = False,
    overwrite: bool = False,
) -> CompressionReport:
    """Compress a dense checkpoint; after ``import hf_prune``, plain ``from_pretrained`` loads the result.

    Args:
        source: A folder with weights in one or more safetensors files, and the masks beside them if there are any.
        folder: The folder to write, atomically: new, empty, or an earlier output.
        codec: ``"zstd"``, or ``"none"`` for uncompressed values.
        values: ``"exact"``, or ``"int8"``, which is lossy: values of pruned weights are rounded to 255 steps for each
            index of the first dimension (outputs of Linear, inputs of GPT-2's Conv1D), or of the second dimension for
            an N:M pattern along the columns of a matrix.
        shard_bytes: Largest size of a file, unless a single tensor is larger.
        remote_code: Add a Python file with which ``from_pretrained(…, trust_remote_code=True)`` loads the checkpoint
            where hf_prune is not installed.
        overwrite: Replace existing files in ``folder``.

    Raises:
        CheckpointError: If the source is damaged or compressed already, or its masks do not fit; if ``remote_code`` is
            set for a model that is not part of transformers; or if something is in the way.
        ConfigError: If a setting is unknown.

    Example:
        >>> compress_checkpoint("pruned", "small")  # doctest: +SKIP
    """
    _check_choice("codec", codec, CODECS)
    _check_choice("values", values, VALUES)
    origin = source_folder(source)
    target = check_output(folder, "compress", [origin], overwrite=overwrite)
    with staged_checkpoint(target, "compress", overwrite=overwrite) as staging:
        return _compress(origin, staging, target, codec, values, shard_bytes, remote_code)


def _compress(
    origin: Path, staging: Path, target: Path, codec: str, values: str, shard_bytes: int, remote_code: bool
) -> CompressionReport:
    paths, index = file_paths(origin)
    if any(is_packed(path) for path in paths):
        raise CheckpointError(f"{origin} is compressed already: expected a dense checkpoint")
    shards = Shards(paths, index)
    masks = StoredMasks(origin / MASK_FILE) if (origin / MASK_FILE).is_file() else None
    if (suffixed := [name for name in shards.entries if name.endswith("_packed")]) and any(
        name.removesuffix("_packed") in shards.entries for name in suffixed
    ):
        raise CheckpointError(f"{origin} has a tensor named {suffixed[0]}, a name that compressed checkpoints need")
    config, structure = read_plain_config(origin)
    packable = _masks_of_files(masks, shards, config) if masks is not None else set()
    classes, changes = (auto_classes(config), changes_of_checkpoint(config)) if remote_code else ({}, {})
    config["quantization_config"] = compressed_config(structure)
    header: dict[str, Any] = {"tensors": len(shards.entries), "values": values}
    if masks is not None and packable:
        header["pruning"] = describe_pruning(masks.config, masks.polishes)
    left_out = copy_other_files(origin, staging, paths)
    items = (
        _packed(shards.folder, entry, masks[entry.name] if masks and entry.name in packable else None, codec, values)
        for entry in shards.entries.values()
    )
    write_shards(staging, items, shard_bytes, header)
    if masks is not None and (rest := {name: masks[name] for name in masks if name not in packable}):
        save_masks(MaskStore(PackedMasks(rest), config=masks.config, polishes=masks.polishes), staging / MASK_FILE)
    if classes:
        add_remote_code(staging, config, classes, changes)
    write_config(staging, config)
    card, stale = renew_card(staging, origin.resolve(), target.resolve().name, lossy=values != "exact")
    after = weights_size(staging)
    return CompressionReport(weights_size(origin), after, values != "exact", (*left_out, *stale), card)


def save_compressed(
    save: Callable[[Path], Any],
    folder: str | os.PathLike[str],
    *,
    codec: str = "zstd",
    values: str = "exact",
    max_shard_size: int | str | None = None,
    remote_code: bool = False,
    overwrite: bool = False,
) -> CompressionReport:
    """Save a compressed checkpoint, by way of a dense one in a temporary folder.

    Args:
        save: Saves the dense checkpoint into a folder.
        folder: The folder for the compressed one, written atomically.
        codec: As for :func:`compress_checkpoint`.
        values: As for :func:`compress_checkpoint`.
        max_shard_size: Largest size of a file, such as ``"2GB"``.
        remote_code: As for :func:`compress_checkpoint`.
        overwrite: Also delete weights in the way that others wrote.

    Raises:
        CheckpointError: If ``folder`` is a file, a weight cannot be packed, or weights that others wrote would be
            deleted.
        ConfigError: If a setting is unknown.
    """
    _check_choice("codec", codec, CODECS)
    _check_choice("values", values, VALUES)
    refuse_file(folder)
    limit = SHARD_BYTES if max_shard_size is None else convert_file_size_to_int(max_shard_size)
    target = Path(folder).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with output_lock(target, SAVE, 600.0), scratch_folder(target) as dense:
        save(dense)
        with staged_checkpoint(target, overwrite=overwrite) as staging:
            return _compress(dense, staging, target, codec, values, limit, remote_code)


def _check_choice(setting: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{setting} is {value!r}: expected one of {', '.join(known)}")


def read_plain_config(folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The config of a checkpoint, and the sizes of a shrunk model in it.

    Raises:
        CheckpointError: If another method quantized it, or the sizes are damaged.
    """
    config = read_config(folder / "config.json")
    settings = config.get("quantization_config") or {}
    if (method := settings.get("quant_method", METHOD)) != METHOD:
        raise CheckpointError(f"{folder} is quantized with {method!r}: expected plain weights")
    structure = settings.get("structure") or {}
    if not is_structure(structure):
        raise CheckpointError(
            f"{folder / 'config.json'} is damaged: its structure is {structure!r}; download or save it again"
        )
    return config, structure


def copy_other_files(source: Path, staging: Path, weights: Sequence[Path]) -> tuple[str, ...]:
    """Copy the files beside the weights, such as tokenizers and cards, and return what was left out."""
    return copy_beside(source, staging, (*_REWRITTEN, *(path.name for path in weights)), ["model*.safetensors"])


def weights_size(folder: Path) -> int:
    """The size of a folder's weights and masks in bytes."""
    return sum(path.stat().st_size for name in ("model*.safetensors", MASK_FILE) for path in folder.glob(name))


def _masks_of_files(masks: Mapping[str, Tensor], shards: Shards, config: Mapping[str, Any]) -> set[str]:
    """The names of the masks that belong to the weights of the same name in the files.

    Masks have the names of the model's parameters. transformers renames, splits and permutes the weights of some model
    types while it loads them, so the same name may stand for another weight, or other rows, in the files.
    """
    same = {name for name in masks if name in shards.entries and _can_pack(shards.entries[name], masked=True)}
    if len(same) == len(masks) and not any(map(get_checkpoint_conversion_mapping, _kinds(config))):
        return same  # nothing is converted, so a mask that does not fit is an error
    return {name for name in same if _fits(masks[name], read_tensor(shards.folder, shards.entries[name]))}


def _fits(mask: Tensor, weight: Tensor) -> bool:
    return mask.shape == weight.shape and not bool((weight.ne(0) & ~mask).any())


def _kinds(config: Any) -> Iterator[str]:
    """The keys by which transformers looks up conversions: types and classes of a model and its parts."""
    if isinstance(config, dict):
        yield from (name for name in (config.get("model_type"), *(config.get("architectures") or ())) if name)
        for part in config.values():
            yield from _kinds(part)


def _can_pack(entry: Entry, masked: bool) -> bool:
    """Whether a tensor is packed: one called weight, and under any other name, as of experts, matrices with a mask."""
    leaf = entry.name.rpartition(".")[2]
    return (leaf == _LEAF or (masked and len(entry.shape) > 1)) and entry.dtype in SPELLED.values()


def _packed(folder: Path, entry: Entry, mask: Tensor | None, codec: str, values: str) -> list[Item]:
    """A tensor to write: packed if it has a mask, or if that makes it smaller."""
    if _can_pack(entry, mask is not None) and (mask is not None or len(entry.shape) > 1 or not entry.size):
        tensor = read_tensor(folder, entry)
        if mask is not None and mask.shape != tensor.shape:
            raise CheckpointError(
                f"the mask of {entry.name} has shape {tuple(mask.shape)}, the weight {tuple(tensor.shape)}: restore "
                f"the matching {MASK_FILE}, or delete it to use the zeros in the weights"
            )
        try:
            data = pack(tensor, mask, codec=codec, values=values)
        except CheckpointError as error:
            raise CheckpointError(f"{entry.name} cannot be packed: {error}") from error
        if mask is not None or len(data) < entry.size or not entry.size:
            return packed_item(entry.name, entry.dtype, data)
    return [plain_item(folder, entry)]
