"""Write a compressed checkpoint out as a plain one."""

from __future__ import annotations

import os
from collections.abc import Iterator

from torch import Tensor

from hf_prune.checkpoint.config_file import write_config
from hf_prune.checkpoint.files import MASK_FILE
from hf_prune.checkpoint.mask_file import StoredMasks, read_pruning, save_masks
from hf_prune.checkpoint.packed.files import Item, PackedFiles, file_paths, write_shards
from hf_prune.checkpoint.packed.format import SPELLED
from hf_prune.checkpoint.packed.quantization_config import is_ours, structure_config
from hf_prune.checkpoint.packed.unpack import unpack
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.conversion.compression import SHARD_BYTES, copy_rest, own_config, plain_item, weights_size
from hf_prune.conversion.compression_report import CompressionReport
from hf_prune.hub.card_renewal import renew_card
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.utils.offload_cache import raw_bytes
from hf_prune.utils.output_folder import check_output, source_folder


def decompress_checkpoint(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> CompressionReport:
    """Write a compressed checkpoint as a dense one, with its masks beside it, which transformers loads alone.

    Args:
        source: A folder that :func:`compress_checkpoint` wrote.
        folder: Where to: a new or empty folder, or an earlier output; at once or not at all.
        shard_bytes: Of a file, at most, unless one tensor has more.
        overwrite: Replace what is in the way in ``folder``.

    Raises:
        CheckpointError: If the source is damaged or not compressed, or something is in the way.
    """
    origin = source_folder(source)
    target = check_output(folder, "decompress", [origin], overwrite=overwrite)
    paths, _ = file_paths(origin)
    files = PackedFiles(paths)
    config, structure = own_config(origin)
    config.pop("quantization_config", None)
    if is_ours(config.get("auto_map")):
        del config["auto_map"]
    if structure:
        config["quantization_config"] = structure_config(structure)
    masks: dict[str, Tensor] = files.masks()
    pruning, polishes = read_pruning(files.described.get("pruning", {}), paths[0])
    if (origin / MASK_FILE).is_file():
        rest = StoredMasks(origin / MASK_FILE)
        masks |= dict(rest)
        pruning, polishes = pruning or rest.config, polishes or rest.polishes
    with staged_checkpoint(target, "decompress", overwrite=overwrite) as staging:
        left = copy_rest(origin, staging, paths)
        write_shards(staging, _dense(files), shard_bytes)
        if masks:
            save_masks(MaskStore(masks, config=pruning, polishes=polishes), staging / MASK_FILE)
        write_config(staging, config)
        card, stale = renew_card(staging, origin.resolve(), target.resolve().name)
        after = weights_size(staging)
    return CompressionReport(weights_size(origin), after, left=(*left, *stale), card=card)


def _dense(files: PackedFiles) -> Iterator[list[Item]]:
    plain = {entry.name: entry for entry in files.plain()}
    for name in files.shards.entries:
        if name in plain:
            yield [plain_item(files.shards.folder, plain[name])]
        elif name in files.headers:
            tensor = unpack(files.data(name), files.headers[name])
            yield [Item(name, SPELLED[tensor.dtype], tuple(tensor.shape), raw_bytes(tensor))]
