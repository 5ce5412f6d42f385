"""Copy what lies in a folder, and refuse links that lead out of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from hf_prune.errors import CheckpointError

# Unpickling runs code from the file; nobody here opens one, or passes it on.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")
MARK = ".hf_prune.json"  # in an output: what wrote it
_SILENT = (MARK, "__pycache__")  # nobody misses them
_OTHER_WEIGHTS = (".h5", ".msgpack")  # of TensorFlow and Flax: not the ones that are written


def copy_beside(
    source: Path,
    folder: Path,
    own: Collection[str] = (),
    stale: Sequence[str] = (),
    skip: Callable[[Path, Path], bool] = lambda name, path: False,
) -> tuple[str, ...]:
    """Copy what lies beside the weights of a checkpoint, in its subfolders too: tokenizers, cards, modules.

    Not copied: hidden files, pickles, weights of TensorFlow and Flax, folders named ``checkpoint-…``, symbolic links
    that lead out of the checkpoint (a snapshot of the Hub's cache has its files in the cache) or to folders, whatever
    is neither file nor folder, and what may not be read.

    Args:
        source: The checkpoint.
        folder: Where to; files that are there already are replaced.
        own: Names in the source itself that the caller sees to.
        stale: Glob patterns of names in the source itself that are left out.
        skip: Whether to leave out a file more, by its path in the checkpoint and on the disk.

    Returns:
        Paths of what was not copied, those of the caller apart.
    """
    source = source.resolve()
    left: list[str] = []

    def visit(here: Path) -> None:
        for path in sorted(here.iterdir()):
            name = path.relative_to(source)
            top = here == source
            if (top and path.name in own) or path.name in _SILENT:
                continue
            refused = (
                is_left_out(name)
                or (path.is_dir() and (path.is_symlink() or path.name.startswith("checkpoint-")))
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
                left.append(name.as_posix())

    visit(source)
    return tuple(left)


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path in a folder is a link to elsewhere; a snapshot of the Hub's cache has its files in the cache."""
    folder = folder.resolve()
    inside = [folder, *(parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots")]
    return not any(Path(os.path.realpath(path)).is_relative_to(place) for place in inside)


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Make sure that files of a folder are in it, where what they say is copied, shown or written anew.

    Args:
        folder: The folder.
        names: Which files; they need not be there.

    Raises:
        CheckpointError: If one is a link that leads out of the folder.
    """
    for path in (folder / name for name in names):
        if path.is_symlink() and leads_out(path, folder):
            raise CheckpointError(
                f"{path} links to a file outside of {folder}, {os.path.realpath(path)}: copy it, or take it out"
            )


def is_left_out(name: Path) -> bool:
    """Whether a file is never copied, by its path in a checkpoint: hidden, a pickle, weights of another framework."""
    return any(part.startswith(".") for part in name.parts) or name.suffix.lower() in (*PICKLES, *_OTHER_WEIGHTS)
