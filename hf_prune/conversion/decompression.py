"""Decompress a checkpoint, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator

from hf_prune.checkpoint.files import MASK_FILE, file_paths
from hf_prune.checkpoint.mask_file import StoredMasks, read_pruning, save_masks
from hf_prune.checkpoint.packed.files import Item, PackedFiles, plain_item, write_shards
from hf_prune.checkpoint.packed.format import SPELLED
from hf_prune.checkpoint.packed.quantization_config import is_ours, structure_config
from hf_prune.checkpoint.packed.unpack import unpack
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.conversion.compression import SHARD_BYTES, copy_other_files, read_plain_config, weights_size
from hf_prune.conversion.compression_report import CompressionReport
from hf_prune.hub.card_renewal import renew_card
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.utils.json_files import write_config
from hf_prune.utils.offload_cache import raw_bytes
from hf_prune.utils.output_folder import check_output, source_folder
from hf_prune.utils.progress import working


@working("Decompressing")
def decompress_checkpoint(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> CompressionReport:
    """Decompress a checkpoint into a dense one with a mask file, which plain transformers loads.

    Args:
        source: A folder that :func:`compress_checkpoint` wrote.
        folder: The folder to write, atomically: new, empty, or an earlier output.
        shard_bytes: Largest size of a file, unless a single tensor is larger.
        overwrite: Replace existing files in ``folder``.

    Raises:
        CheckpointError: If the source is damaged or not compressed, or something is in the way.
    """
    origin = source_folder(source)
    target = check_output(folder, "decompress", [origin], overwrite=overwrite)
    paths, _ = file_paths(origin)
    files = PackedFiles(paths)
    config, structure = read_plain_config(origin)
    config.pop("quantization_config", None)
    if is_ours(config.get("auto_map")):
        del config["auto_map"]
    if structure:
        config["quantization_config"] = structure_config(structure)
    masks = PackedMasks(files.masks())
    pruning, polishes = read_pruning(files.header.get("pruning", {}), paths[0])
    if (origin / MASK_FILE).is_file():
        rest = StoredMasks(origin / MASK_FILE)
        masks |= rest
        pruning, polishes = pruning or rest.config, polishes or rest.polishes
    with staged_checkpoint(target, "decompress", overwrite=overwrite) as staging:
        left_out = copy_other_files(origin, staging, paths)
        write_shards(staging, _dense(files), shard_bytes)
        if masks:
            save_masks(MaskStore(masks, config=pruning, polishes=polishes), staging / MASK_FILE)
        write_config(staging, config)
        card, stale = renew_card(staging, origin.resolve(), target.resolve().name)
        after = weights_size(staging)
    return CompressionReport(weights_size(origin), after, left=(*left_out, *stale), card=card)


def _dense(files: PackedFiles) -> Iterator[list[Item]]:
    """The tensors of a dense checkpoint, unpacked one at a time."""
    plain = {entry.name: entry for entry in files.plain()}
    for name in files.shards.entries:
        if name in plain:
            yield [plain_item(files.shards.folder, plain[name])]
        elif name in files.headers:
            tensor = unpack(files.data(name), files.headers[name])
            yield [Item(name, SPELLED[tensor.dtype], tuple(tensor.shape), raw_bytes(tensor))]
