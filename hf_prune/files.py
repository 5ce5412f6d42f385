"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError, DataError

# Unpickling runs code from the file; nobody here opens one, or passes it on.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")
_OTHER_WEIGHTS = (".h5", ".msgpack")  # of TensorFlow and Flax: not the ones that are written


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends without an error.

    Args:
        path: The file to write; its folder is made if needed.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file at once."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        DataError: If it is not in UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{os.fspath(path)} is not in UTF-8: {error.reason}; save it as UTF-8") from error


def write_json(path: str | os.PathLike[str], values: Any) -> Path:
    """Write a JSON file at once."""
    return write_text(path, json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def staged_folder(
    folder: str | os.PathLike[str], stale: Sequence[str] = (), last: Sequence[str] = ()
) -> Iterator[Path]:
    """A temporary folder whose files move into ``folder`` when the block ends without an error.

    A new folder appears by one rename. An existing one is exchanged for the new one by one rename as well where the
    system can do that (Linux); files that the block did not write stay unless ``stale`` names them. Elsewhere, files
    are replaced one by one, each at once, and a reader that needs a file of ``last`` to make sense of the others sees
    the old set, no complete set, or the new set, never a mixture.

    Args:
        folder: Where the files belong.
        stale: Glob patterns of files that go if the block did not write them.
        last: Glob patterns of files that are taken away before anything is replaced, and arrive after it, in this
            order; what arrives last goes first.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = _temporary(folder)
    staging.mkdir()
    try:
        yield staging
        if not _exchange(staging, folder, [*stale, *last]):
            move_into(staging, folder, stale, last)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _exchange(staging: Path, folder: Path, replaced: Sequence[str]) -> bool:
    """Give a folder's name to another one that has all its files but those to replace; False if that cannot be done.

    What stays is in both by a hard link, so that who has a file open goes on writing to it.
    """
    if not folder.exists() or _inside(folder) or (swap := _swap_names()) is None:
        return False
    gone = {path.relative_to(folder) for pattern in replaced for path in folder.glob(pattern)}
    for path in (path for path in staging.rglob("*") if path.is_file()):
        sync(path)
    try:
        _link_missing(folder, staging, gone)
        shutil.copymode(folder, staging)
    except OSError:  # a file system without links
        return False
    if not swap(staging, folder):
        return False
    with contextlib.suppress(OSError):
        _link_missing(staging, folder, gone)  # what appeared in the meantime
    return True


def _inside(folder: Path) -> bool:
    """Whether this process, and the shell that started it, stand in a folder, which should not be pulled away."""
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:
        return False


def _link_missing(source: Path, target: Path, gone: Collection[Path]) -> None:
    for path in source.rglob("*"):
        name = path.relative_to(source)
        if name in gone or os.path.lexists(target / name):
            continue
        if path.is_dir() and not path.is_symlink():
            (target / name).mkdir(parents=True)
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target / name, follow_symlinks=False)


def _swap_names() -> Callable[[Path, Path], bool] | None:
    """Exchanges the names of two folders in one step: ``renameat2`` of Linux."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return lambda a, b: rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def move_into(
    staging: Path,
    folder: Path,
    stale: Sequence[str] = (),
    last: Sequence[str] = (),
    arrived: Collection[Path] = (),
) -> None:
    """Move a folder's files into another folder, as :func:`staged_folder` says.

    Args:
        staging: What is moved, on the same file system.
        folder: Where to; made by one rename if it does not exist.
        stale: As for :func:`staged_folder`.
        last: As for :func:`staged_folder`.
        arrived: Files that an earlier call has moved, before it was interrupted.
    """
    new = sorted(p.relative_to(staging) for p in staging.rglob("*") if p.is_file())
    for name in new:
        sync(staging / name)
    if not folder.exists():
        staging.rename(folder)
        return
    for pattern in (*reversed(last), *stale):
        for old in list(folder.glob(pattern)):
            name = old.relative_to(folder)
            if name not in arrived and (pattern in last or name not in new):
                old.unlink(missing_ok=True)
    rank = {name: i for i, pattern in enumerate(last, start=1) for name in new if name.match(pattern)}
    for name in sorted(new, key=lambda name: rank.get(name, 0)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).replace(folder / name)


def refuse_file(folder: str | os.PathLike[str]) -> None:
    """Make sure that a checkpoint can be saved there.

    Raises:
        CheckpointError: If it is a file.
    """
    if Path(folder).is_file():
        raise CheckpointError(f"{os.fspath(folder)} is a file: expected a folder to save into")


def source_and_target(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The folder of a checkpoint and the one that a new checkpoint made of it goes to.

    Raises:
        CheckpointError: If the first is no folder, the second is a file, or they are the same, by whatever names.
    """
    origin, target = Path(source), Path(folder)
    if not origin.is_dir():
        raise CheckpointError(f"{os.fspath(source)} is no folder: expected one with config.json and model.safetensors")
    refuse_file(target)
    if target.exists() and origin.samefile(target):
        raise CheckpointError(f"{os.fspath(folder)} would replace itself: name another folder")
    return origin, target


def copy_beside(
    source: Path, folder: Path, own: Collection[str] = (), ours: Collection[Path] = (), stale: Sequence[str] = ()
) -> tuple[str, ...]:
    """Copy what lies beside the weights of a checkpoint, in its subfolders too: tokenizers, cards, modules.

    Not copied: hidden files, pickles, weights of TensorFlow and Flax, folders named ``checkpoint-…``, symbolic links
    that lead out of the checkpoint (a snapshot of the Hub's cache has its files in the cache) or to folders, and
    whatever is neither file nor folder.

    Args:
        source: The checkpoint.
        folder: Where to; files that are there already are replaced.
        own: Names in the source itself that the caller sees to.
        ours: Folders that belong to what is being written, and may lie in the source.
        stale: Glob patterns of names in the source itself that are left out.

    Returns:
        Paths of what was not copied, those of the caller apart.
    """
    source = source.resolve()
    inside = [source, *(parent.parent / "blobs" for parent in source.parents if parent.name == "snapshots")]
    skipped = {path.resolve() for path in (folder, *ours)}
    left: list[str] = []

    def visit(here: Path) -> None:
        for path in sorted(here.iterdir()):
            name = path.relative_to(source)
            top = here == source
            if (top and path.name in own) or path in skipped:
                continue
            refused = (
                path.name.startswith(".")
                or (path.is_dir() and (path.is_symlink() or path.name.startswith("checkpoint-")))
                or path.suffix.lower() in (*PICKLES, *_OTHER_WEIGHTS)
                or (top and any(path.match(pattern) for pattern in stale))
                or not any(Path(os.path.realpath(path)).is_relative_to(place) for place in inside)
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


def sync(path: Path) -> None:
    """Have the operating system write a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _temporary(path: Path) -> Path:
    """A name that nobody else uses, in the same folder, so that a rename stays on one file system."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
