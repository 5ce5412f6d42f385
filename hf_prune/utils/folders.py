"""Which files of a folder are copied and uploaded, and links that lead out of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path, PurePath

from hf_prune.errors import CheckpointError

# Opening a pickle runs code from it: none is opened, copied or uploaded.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")
MARK = ".hf_prune.json"  # in an output: the command that wrote it
RUN_FILE = "hf_prune_run.yaml"  # in an output: the settings that repeat it
_NOT_REPORTED = (MARK, "__pycache__")  # left out without being listed as such
_OTHER_FRAMEWORKS = (".h5", ".msgpack")  # weights of TensorFlow and Flax
_OF_TRAINING = "checkpoint-"  # how the names of a Trainer's folders begin


def copy_beside(
    source: Path,
    folder: Path,
    handled: Collection[str] = (),
    stale: Sequence[str] = (),
    skip: Callable[[Path, Path], bool] = lambda name, path: False,
) -> tuple[str, ...]:
    """Copy the files beside the weights of a checkpoint, including subfolders: tokenizers, cards, modules.

    Not copied: hidden files, pickles, weights of TensorFlow and Flax, folders named ``checkpoint-…``, links to folders
    or out of the checkpoint (except into the Hub's cache, where the files of a snapshot are), special files, and files
    without read permission.

    Args:
        source: The checkpoint.
        folder: The folder to copy into; existing files are replaced.
        handled: Names at the top of the source that the caller handles itself.
        stale: Glob patterns of names at the top of the source that are left out.
        skip: Also leaves out a file, given its path in the checkpoint and on the disk.

    Returns:
        Paths of what was left out, without ``handled``.
    """
    source = source.resolve()
    left_out: list[str] = []

    def visit(here: Path) -> None:
        for path in sorted(here.iterdir()):
            name = path.relative_to(source)
            top = here == source
            if (top and path.name in handled) or path.name in _NOT_REPORTED:
                continue
            refused = (
                is_left_out(name)
                or (path.is_dir() and (path.is_symlink() or path.name.startswith(_OF_TRAINING)))
                or (top and any(path.match(pattern) for pattern in stale))
                or leads_out(path, source)
                or (path.is_file() and skip(name, path))
                or not os.access(path, os.R_OK)
            )
            if path.is_dir() and not refused:
                visit(path)
            elif path.is_file() and not refused:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
            else:
                left_out.append(name.as_posix())

    visit(source)
    return tuple(left_out)


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path in a folder links to a place outside; the files of a snapshot in the Hub's cache do not."""
    folder = folder.resolve()
    inside = [folder, *(parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots")]
    return not any(Path(os.path.realpath(path)).is_relative_to(place) for place in inside)


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse files that link to a place outside of their folder, before their content is copied, shown or replaced.

    Args:
        folder: The folder.
        names: Names of files, which need not exist.

    Raises:
        CheckpointError: If one is a link that leads out of the folder.
    """
    for path in (folder / name for name in names):
        if path.is_symlink() and leads_out(path, folder):
            raise CheckpointError(
                f"{path} links to a file outside of {folder}, {os.path.realpath(path)}: copy that file, or remove the "
                f"link"
            )


def is_left_out(name: PurePath) -> bool:
    """Whether a file is never copied, given its path in a checkpoint: also weights of TensorFlow and Flax."""
    return is_never_uploaded(name) or name.suffix.lower() in _OTHER_FRAMEWORKS


def is_never_uploaded(name: PurePath) -> bool:
    """Whether a file is never uploaded, given its path in a folder: hidden, a pickle, or in ``checkpoint-…``."""
    hidden = any(part.startswith(".") for part in name.parts)
    of_training = any(part.startswith(_OF_TRAINING) for part in name.parts[:-1])
    return hidden or of_training or name.suffix.lower() in PICKLES
