"""Replace an old checkpoint by a new one, so that one of them is complete at any moment."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from hf_prune.checkpoint.companions import tokenizer_files
from hf_prune.checkpoint.files import INDEX, MASK_FILE, OF_WEIGHTS, WEIGHTS, has_weights, is_weights, of_variant
from hf_prune.errors import CheckpointError
from hf_prune.utils.folders import MARK
from hf_prune.utils.locks import output_lock
from hf_prune.utils.output_folder import SAVE, check_output, own_files, refuse_file, warn_replaced, write_mark
from hf_prune.utils.staging import staged_folder


@contextlib.contextmanager
def staged_checkpoint(
    folder: str | os.PathLike[str],
    command: str = SAVE,
    *,
    overwrite: bool = False,
    variant: str | None = None,
    beside: Collection[str | os.PathLike[str] | None] = (),
    announce: bool = True,
) -> Iterator[Path]:
    """A temporary folder that becomes a checkpoint, or replaces the weights of an old one.

    See :func:`hf_prune.utils.staging.staged_folder`. Weights of other variants stay, and so do files of others. Files
    that describe the replaced weights are deleted with them, and so are other files of the same command.

    Args:
        folder: Where the checkpoint belongs.
        command: The command that writes it, see :func:`hf_prune.utils.output_folder.check_output`.
            ``"save_pretrained"`` replaces the files that it writes, as in transformers, and deletes only weights that
            hf_prune wrote.
        overwrite: Replace existing files of others.
        variant: Variant of the weights, as in ``save_pretrained``.
        beside: As for :func:`hf_prune.utils.output_folder.check_output`.
        announce: Log which files are replaced, except by ``"save_pretrained"``.

    Raises:
        CheckpointError: If ``folder`` is a file, or weights that others wrote would be deleted. If something else
            appeared in the folder in the meantime, the result is kept beside it, under the name in the message.
    """
    folder = Path(folder)
    refuse_file(folder)
    stale: list[str] = []
    last: list[str] = []
    wait = 600.0 if command == SAVE else 0.0
    with output_lock(folder, command, wait), staged_folder(folder, stale, last) as staging:
        yield staging
        if command != SAVE:
            try:
                check_output(folder, command, overwrite=overwrite, beside=beside)
            except CheckpointError as error:
                kept = staging.rename(folder.with_name(f"{folder.name}-{staging.name[-10:-4]}"))
                raise CheckpointError(f"{error}. The result is in {kept}") from None
        stale += finish_checkpoint(staging, folder, command, overwrite=overwrite, variant=variant, announce=announce)
        if command != SAVE or has_weights(staging, variant):  # not for adapters, for one
            last += essential_files(variant)


def essential_files(variant: str | None = None) -> tuple[str, ...]:
    """The files that every reader of a checkpoint needs: without one, half-replaced weights are an error."""
    index = of_variant(INDEX, variant)
    return index, MASK_FILE, "config.json"


def finish_checkpoint(
    staging: Path,
    folder: Path,
    command: str,
    *,
    overwrite: bool = False,
    variant: str | None = None,
    announce: bool = True,
) -> list[str]:
    """Mark a finished checkpoint as the output of a command.

    Args:
        staging: The checkpoint.
        folder: Where it belongs.
        command: As for :func:`staged_checkpoint`.
        overwrite: As for :func:`staged_checkpoint`.
        variant: As for :func:`staged_checkpoint`.
        announce: As for :func:`staged_checkpoint`.

    Returns:
        Glob patterns of the files that must be deleted from the folder.

    Raises:
        CheckpointError: As for :func:`staged_checkpoint`.
    """
    written = {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()} - {MARK}
    present = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    ours = own_files(folder)
    replaces = command != SAVE or has_weights(staging, variant)
    removed = {name for name in present - written if replaces and is_weights(name, variant)}
    foreign = sorted(name for name in removed if name not in ours and name.endswith(".safetensors"))
    if command == SAVE and foreign and not overwrite:
        raise CheckpointError(
            f"{folder} holds {', '.join(foreign[:3])}, which this save would delete and did not write: save into "
            f"another folder, remove the file, or pass overwrite=True"
        )
    if command != SAVE:
        removed |= ours.keys() - written
        if written & {"tokenizer.json", "tokenizer_config.json"}:  # files of different tokenizers do not fit together
            removed |= (present & tokenizer_files()) - written
    if replaces and (command != SAVE or not other_variants(folder, variant)):
        removed |= present & {*OF_WEIGHTS, MASK_FILE} - written
    kept = {name: stamp for name, stamp in ours.items() if name not in removed} if command == SAVE else None
    write_mark(staging, command, written - set(OF_WEIGHTS), kept)
    if command != SAVE and announce:  # save_pretrained replaces files in transformers too
        warn_replaced(folder, {*removed, *written})
    return [glob.escape(name) for name in sorted(removed)]


def other_variants(folder: Path, variant: str | None) -> list[str]:
    """Weight files of other variants that hf_prune saved in a folder, which share its mask file."""
    names = sorted(own_files(folder))
    return [n for n in names if n.endswith(".safetensors") and WEIGHTS.fullmatch(n) and not is_weights(n, variant)]
