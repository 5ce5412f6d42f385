"""Checkpoints on disk: dense into compressed and back, tensor by tensor, so that memory stays at one file.

The masks in ``pruning_masks.safetensors`` become the positions of the values that stay, so a weight that was kept and
is zero is still kept; without masks, what is not zero stays. ``docs/format.md`` specifies the files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import convert_file_size_to_int
from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from hf_prune.checkpoint.config_file import write_config
from hf_prune.checkpoint.files import MASK_FILE
from hf_prune.checkpoint.mask_file import StoredMasks, pruning_of, save_masks
from hf_prune.checkpoint.packed.files import INDEX, Item, file_paths, packed_item, write_shards
from hf_prune.checkpoint.packed.format import CODECS, SPELLED, VALUES, is_packed
from hf_prune.checkpoint.packed.pack import pack
from hf_prune.checkpoint.packed.quantization_config import compressed_config, is_structure
from hf_prune.checkpoint.packed.remote_code import FILE, add_remote_code, auto_classes
from hf_prune.checkpoint.shards import Entry, Shards, read_tensor
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.conversion.compression_report import CompressionReport
from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.hub.card_renewal import renew_card
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.utils.folders import copy_beside
from hf_prune.utils.json_files import read_config
from hf_prune.utils.locks import output_lock
from hf_prune.utils.output_folder import SAVE, check_output, refuse_file, source_folder
from hf_prune.utils.quantization_method import METHOD
from hf_prune.utils.staging import scratch_folder

SHARD_BYTES = 5 << 30
_LEAF = "weight"
_OWN = (MASK_FILE, "config.json", INDEX, FILE)  # written anew, or not at all


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
    """Write a dense checkpoint as a compressed one; after ``import hf_prune``, plain ``from_pretrained`` loads it.

    Args:
        source: A folder with safetensors files, in one or more parts, and the masks beside them if there are any.
        folder: Where to: a new or empty folder, or an earlier output; at once or not at all.
        codec: ``"zstd"``, or ``"none"`` for values that lie in the file as they are.
        values: ``"int8"``, which is lossy, rounds the values of pruned weights to 255 steps for each index of the first
            dimension: outputs of Linear, inputs of GPT-2's Conv1D. Of an N:M pattern that runs down the columns of a
            matrix it is the second dimension.
        shard_bytes: Of a file, at most, unless one tensor has more.
        remote_code: Put a file beside the weights by which ``from_pretrained(…, trust_remote_code=True)`` loads them
            where hf_prune is not installed.
        overwrite: Replace what is in the way in ``folder``.

    Raises:
        CheckpointError: If the source is damaged, compressed already, or its masks do not fit; if ``remote_code`` is
            asked of a shrunk model or one that is not of transformers; or if something is in the way.
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
        raise CheckpointError(f"{origin} has a tensor named {suffixed[0]}, which compressed checkpoints use themselves")
    config, structure = own_config(origin)
    mine = _masks_of_files(masks, shards, config) if masks is not None else set()
    classes = auto_classes(config) if remote_code else {}
    config["quantization_config"] = compressed_config(structure)
    described: dict[str, Any] = {"tensors": len(shards.entries), "values": values}
    if masks is not None and mine:
        described["pruning"] = pruning_of(masks.config, masks.polishes)
    left = copy_rest(origin, staging, paths)
    items = (
        _packed(shards.folder, entry, masks[entry.name] if masks and entry.name in mine else None, codec, values)
        for entry in shards.entries.values()
    )
    write_shards(staging, items, shard_bytes, described)
    if masks is not None and (rest := {name: masks[name] for name in masks if name not in mine}):
        save_masks(MaskStore(rest, config=masks.config, polishes=masks.polishes), staging / MASK_FILE)
    if classes:
        add_remote_code(staging, config, classes)
    write_config(staging, config)
    card, stale = renew_card(staging, origin.resolve(), target.resolve().name, lossy=values != "exact")
    after = weights_size(staging)
    return CompressionReport(weights_size(origin), after, values != "exact", (*left, *stale), card)


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
    """Save a checkpoint dense into a folder that is gone afterwards, and compressed into the one that stays.

    Args:
        save: Saves the dense checkpoint into a folder.
        folder: Where the compressed one goes; at once or not at all.
        codec: As of :func:`compress_checkpoint`.
        values: As of :func:`compress_checkpoint`.
        max_shard_size: Of a file, such as ``"2GB"``.
        remote_code: As of :func:`compress_checkpoint`.
        overwrite: Also delete weights in the way that were written by others.

    Raises:
        CheckpointError: If ``folder`` is a file, a weight cannot be packed, or weights that others wrote would go.
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


def own_config(folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The config of a checkpoint that is not quantized otherwise, and the sizes of a shrunk model."""
    config = read_config(folder / "config.json")
    described = config.get("quantization_config") or {}
    if (method := described.get("quant_method", METHOD)) != METHOD:
        raise CheckpointError(f"{folder} is quantized with {method!r}: expected plain weights")
    structure = described.get("structure") or {}
    if not is_structure(structure):
        raise CheckpointError(
            f"{folder / 'config.json'} is damaged: its structure is {structure!r}; download or save it again"
        )
    return config, structure


def copy_rest(source: Path, staging: Path, weights: Sequence[Path]) -> tuple[str, ...]:
    """Tokenizers, cards and what else lies beside the weights; what was left out."""
    own = (*_OWN, *(path.name for path in weights))
    return copy_beside(source, staging, own, ["model*.safetensors"])


def weights_size(folder: Path) -> int:
    """Bytes of a folder's weights and masks."""
    return sum(path.stat().st_size for name in ("model*.safetensors", MASK_FILE) for path in folder.glob(name))


def _masks_of_files(masks: Mapping[str, Tensor], shards: Shards, config: Mapping[str, Any]) -> set[str]:
    """The masks that belong to the weights of the same name in the files, and not only to parameters of the model.

    transformers renames, splits and permutes the weights of some model types while it loads them, so that a name may
    stand for one weight in the files and for another, or its rows in another order, in the model.
    """
    same = {name for name in masks if name in shards.entries and _can_pack(shards.entries[name])}
    if len(same) == len(masks) and not any(map(get_checkpoint_conversion_mapping, _kinds(config))):
        return same  # a mask that does not fit is then an error
    return {name for name in same if _fits(masks[name], read_tensor(shards.folder, shards.entries[name]))}


def _fits(mask: Tensor, weight: Tensor) -> bool:
    return mask.shape == weight.shape and not bool((weight.ne(0) & ~mask).any())


def _kinds(config: Any) -> Iterator[str]:
    """By what transformers looks up conversions: types of a model and its parts, and classes."""
    if isinstance(config, dict):
        yield from (name for name in (config.get("model_type"), *(config.get("architectures") or ())) if name)
        for part in config.values():
            yield from _kinds(part)


def _can_pack(entry: Entry) -> bool:
    leaf = entry.name.rpartition(".")[2]
    return leaf == _LEAF and entry.dtype in SPELLED.values()


def _packed(folder: Path, entry: Entry, mask: Tensor | None, codec: str, values: str) -> list[Item]:
    """One tensor as it is written: packed if it has a mask, or gets smaller by it."""
    if _can_pack(entry) and (mask is not None or len(entry.shape) > 1 or not entry.size):
        tensor = read_tensor(folder, entry)
        if mask is not None and mask.shape != tensor.shape:
            raise CheckpointError(
                f"the mask of {entry.name} has shape {tuple(mask.shape)}, the weight {tuple(tensor.shape)}: restore "
                f"the matching {MASK_FILE}, or delete it to go by what is zero"
            )
        try:
            data = pack(tensor, mask, codec=codec, values=values)
        except CheckpointError as error:
            raise CheckpointError(f"{entry.name} cannot be packed: {error}") from error
        if mask is not None or len(data) < entry.size or not entry.size:
            return packed_item(entry.name, entry.dtype, data)
    return [plain_item(folder, entry)]


def plain_item(folder: Path, entry: Entry) -> Item:
    """A tensor as it is in a safetensors file, to be written again."""
    data = bytearray(entry.size)
    with (folder / entry.shard).open("rb") as file:
        file.seek(entry.start)
        if file.readinto(data) != entry.size:
            raise CheckpointError(f"{entry.shard} ends within {entry.name}: it was changed; start again")
    return Item(entry.name, entry.dtype, entry.shape, data)
