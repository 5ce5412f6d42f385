"""How a new checkpoint takes the place of an old one."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from hf_prune.checkpoint.companions import tokenizer_files
from hf_prune.checkpoint.files import MASK_FILE, OF_WEIGHTS, WEIGHTS, has_weights, is_weights, of_variant
from hf_prune.checkpoint.packed.files import (
    INDEX,
)
from hf_prune.errors import CheckpointError
from hf_prune.utils.folders import MARK
from hf_prune.utils.locks import output_lock
from hf_prune.utils.output_folder import SAVE, check_output, own_files, refuse_file, say_replaced, write_mark
from hf_prune.utils.staging import staged_folder


@contextlib.contextmanager
def staged_checkpoint(
    folder: str | os.PathLike[str],
    command: str = SAVE,
    *,
    overwrite: bool = False,
    variant: str | None = None,
    beside: Collection[str | os.PathLike[str] | None] = (),
) -> Iterator[Path]:
    """A temporary folder that becomes, or replaces the weights of, a checkpoint; see ``files.staged_folder``.

    Weights of other variants and files of others stay. What describes weights that are replaced goes with them, and so
    does what the same command had written besides.

    Args:
        folder: Where the checkpoint belongs.
        command: What writes it, see ``outputs.check_output``. ``"save_pretrained"`` replaces what it writes, as
            transformers does, and of other weights only what we wrote.
        overwrite: Replace what is in the way.
        variant: Of the weights, as of ``save_pretrained``.
        beside: As of ``outputs.check_output``.

    Raises:
        CheckpointError: If ``folder`` is a file, or weights that somebody else wrote would go. If something got in the
            way of a command in the meantime, its result is kept beside the folder, under the name in the message.
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
        stale += finish_checkpoint(staging, folder, command, overwrite=overwrite, variant=variant)
        if command != SAVE or has_weights(staging, variant):  # and not adapters alone, say
            last += completing(variant)


def completing(variant: str | None = None) -> tuple[str, ...]:
    """The files without which nobody loads a checkpoint: a half-replaced one is an error and never a mixture."""
    index = of_variant(INDEX, variant)
    return index, MASK_FILE, "config.json"


def finish_checkpoint(
    staging: Path, folder: Path, command: str, *, overwrite: bool = False, variant: str | None = None
) -> list[str]:
    """Mark a checkpoint that is ready as an output of a command.

    Args:
        staging: The checkpoint.
        folder: Where it belongs.
        command: As of :func:`staged_checkpoint`.
        overwrite: As of :func:`staged_checkpoint`.
        variant: As of :func:`staged_checkpoint`.

    Returns:
        Glob patterns of files that have to go from the folder.

    Raises:
        CheckpointError: As :func:`staged_checkpoint`.
    """
    written = {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()} - {MARK}
    present = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    own = own_files(folder)
    replaces = command != SAVE or has_weights(staging, variant)
    gone = {name for name in present - written if replaces and is_weights(name, variant)}
    foreign = sorted(name for name in gone if name not in own and name.endswith(".safetensors"))
    if command == SAVE and foreign and not overwrite:
        raise CheckpointError(
            f"{folder} holds {', '.join(foreign[:3])}, which this save would delete and did not write: save into "
            f"another folder, take the file out, or pass overwrite=True"
        )
    if command != SAVE:
        gone |= own.keys() - written
        if written & {"tokenizer.json", "tokenizer_config.json"}:  # its files make sense together only
            gone |= (present & tokenizer_files()) - written
    if replaces and (command != SAVE or not other_variants(folder, variant)):
        gone |= present & {*OF_WEIGHTS, MASK_FILE} - written
    kept = {name: said for name, said in own.items() if name not in gone} if command == SAVE else None
    write_mark(staging, command, written - set(OF_WEIGHTS), kept)
    if command != SAVE:  # who calls save_pretrained knows
        say_replaced(folder, {*gone, *written})
    return [glob.escape(name) for name in sorted(gone)]


def other_variants(folder: Path, variant: str | None) -> list[str]:
    """Weights in a folder that we saved as another variant, with the masks that lie there."""
    names = sorted(own_files(folder))
    return [n for n in names if n.endswith(".safetensors") and WEIGHTS.fullmatch(n) and not is_weights(n, variant)]
