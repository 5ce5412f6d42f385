"""Replace the files of a folder all at once, or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from hf_prune.errors import CheckpointError
from hf_prune.utils.files import sync, temporary_beside, write_json

_OLD = ".old"
_LIVE: set[Path] = set()  # hidden folders that this process is using


@contextlib.contextmanager
def staged_folder(
    folder: str | os.PathLike[str], stale: Sequence[str] = (), last: Sequence[str] = ()
) -> Iterator[Path]:
    """A temporary folder whose files move into ``folder`` when the block ends without an error.

    A new folder appears with one rename. An existing one is exchanged for the new one in one step where the system
    can do that (Linux). Files that the block did not write stay, unless they match ``stale``. Elsewhere, files are
    replaced one by one: an error in between puts the old ones back, and a reader that needs a file of ``last`` to use
    the others sees the old set, no complete set, or the new set, never a mixture. If the process is killed in between,
    the next process that writes there puts the old files back; until then the new files are complete in a hidden
    folder beside it, and the old ones in another.

    Modes, owners, groups and times of folders are kept, and so are modes and owners of replaced files.

    Args:
        folder: Where the files belong.
        stale: Glob patterns of files to delete if the block did not write them; read when the block ends.
        last: Glob patterns of files that are moved away before all others, and put in place after all others, in this
            order; read when the block ends.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder) as staging:
        yield staging
        place_folder(staging, folder, stale, last)


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside another one, deleted afterwards unless it holds files that could not be put back."""
    scratch = temporary_beside(folder)
    scratch.mkdir()
    _LIVE.add(scratch)
    try:
        yield scratch
    finally:
        _LIVE.discard(scratch)  # first, so that after an interrupt the next process removes it
        if not _old(scratch).exists():
            shutil.rmtree(scratch, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left beside a folder, and put back the files that they had moved out of it.

    The caller must hold the folder's lock, see :func:`hf_prune.utils.locks.output_lock`.
    """
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{12}}\.tmp(?P<old>{_OLD})?")
    leftovers = {path: match for path in folder.parent.iterdir() if (match := pattern.fullmatch(path.name))}
    for path in sorted(leftovers, key=lambda path: leftovers[path]["old"] is None):  # old files first: put them back
        if path.is_dir() and path not in _LIVE and path.with_name(path.name.removesuffix(_OLD)) not in _LIVE:
            if leftovers[path]["old"]:
                put_back(path.with_name(path.name.removesuffix(_OLD)), folder)
            shutil.rmtree(path, ignore_errors=True)


def place_folder(staging: Path, folder: Path, stale: Sequence[str] = (), last: Sequence[str] = ()) -> None:
    """Move the files of one folder into another one, as :func:`staged_folder` describes.

    Args:
        staging: The folder with the new files, on the same file system; the caller deletes what remains of it.
        folder: The folder to move into; created with one rename if it does not exist.
        stale: As for :func:`staged_folder`.
        last: As for :func:`staged_folder`.

    Raises:
        CheckpointError: If a folder has the name of a new file; or if an error in between could not be undone, with
            the places of all files.
    """
    if put_back(staging, folder):  # an earlier call was interrupted after its last step
        return
    for path in _files_of(staging):
        sync(staging / path)
    if not folder.exists():
        staging.rename(folder)
        return
    new = _files_of(staging)
    for name in new:
        if (folder / name).is_dir():
            raise CheckpointError(f"{folder / name} is a folder: expected a file, or nothing, with that name")
        _copy_ownership(staging / name, folder / name, folder)
    matches = (path for pattern in (*stale, *last) for path in folder.glob(pattern))
    removed = {path.relative_to(folder) for path in matches if not path.is_dir()}
    if not _exchange(staging, folder, removed):
        _replace_one_by_one(staging, folder, removed, new, last)


def _exchange(staging: Path, folder: Path, removed: Collection[Path]) -> bool:
    """Swap the names of two folders, after adding the files that stay to the new one; False if that is not possible.

    Files that stay are hard links in both, so that a program that has one open continues to write to it.
    """
    if _inside(folder) or (swap := _swap_names()) is None:
        return False
    try:
        _link_missing(folder, staging, removed)
    except OSError:  # a file system without links, or a subfolder without permission
        return False
    if not swap(staging, folder):
        return False
    with contextlib.suppress(OSError):
        _link_missing(staging, folder, removed)  # files that were added in the meantime
    return True


def _inside(folder: Path) -> bool:
    """Whether the working directory is in a folder: a swap would leave the shell in the old one."""
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:
        return False


def _link_missing(source: Path, target: Path, removed: Collection[Path]) -> None:
    """Link the files that ``target`` lacks into it, and copy modes, owners and times of the folders.

    Raises:
        OSError: If anything cannot be listed, linked or copied.
    """

    def refuse(error: OSError) -> None:
        raise error

    folders = []
    for place, subfolders, files in os.walk(source, onerror=refuse):
        here = Path(place)
        folders.append(here)
        (target / here.relative_to(source)).mkdir(exist_ok=True)
        for name in (*files, *(link for link in subfolders if (here / link).is_symlink())):
            path = (here / name).relative_to(source)
            if path not in removed and not os.path.lexists(target / path):
                os.link(source / path, target / path, follow_symlinks=False)
    for here in reversed(folders):  # inner ones first, since a new entry changes the time of its folder
        there = target / here.relative_to(source)
        _copy_owner(here, there)
        shutil.copystat(here, there)


def _copy_owner(source: Path, target: Path) -> None:
    """Give a file or folder the owner and group of another one."""
    wanted, present = source.stat(), target.stat()
    if hasattr(os, "chown") and (wanted.st_uid, wanted.st_gid) != (present.st_uid, present.st_gid):
        os.chown(target, wanted.st_uid, wanted.st_gid)


def _copy_ownership(new: Path, old: Path, folder: Path) -> None:
    """Give a file the mode and owner of the one that it replaces, or else the group of a setgid folder."""
    with contextlib.suppress(PermissionError):  # writable, but owned by somebody else
        if old.is_file() and not old.is_symlink():
            _copy_owner(old, new)
            shutil.copymode(old, new)
        elif hasattr(os, "chown") and folder.stat().st_mode & stat.S_ISGID:
            os.chown(new, -1, folder.stat().st_gid)


def _swap_names() -> Callable[[Path, Path], bool] | None:
    """A function that swaps the names of two folders in one step, ``renameat2`` of Linux; None elsewhere."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return lambda a, b: rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _replace_one_by_one(
    staging: Path, folder: Path, removed: Collection[Path], new: Sequence[Path], last: Sequence[str]
) -> None:
    """Replace a folder's files one by one; the old ones are kept aside until all are replaced.

    The new ones also stay in ``staging``, as hard links, so that the old or the new set is complete at any moment.
    """
    rank = {name: i for i, pattern in enumerate(last, start=1) for name in {*removed, *new} if name.match(pattern)}

    def order(name: Path) -> tuple[int, Path]:
        return rank.get(name, 0), name

    going = sorted((name for name in {*removed, *new} if os.path.lexists(folder / name)), key=order, reverse=True)
    coming = sorted(new, key=order)
    aside = _old(staging)
    try:
        (aside / "files").mkdir(parents=True)
        plan = {"going": [str(name) for name in going], "coming": [str(name) for name in coming]}
        write_json(aside / "plan.json", plan)
        for name in going:
            _rename(folder / name, aside / "files" / name)
        for name in coming:
            _link_or_rename(staging / name, folder / name)
        (aside / "plan.json").rename(aside / "done.json")
    except BaseException as error:
        try:
            put_back(staging, folder)
        except BaseException as again:
            raise CheckpointError(
                f"{folder} could not be written ({error!r}), and the files moved out of it could not be put back "
                f"({again!r}): they are in {aside / 'files'}, and the new ones are in {staging} and {folder}"
            ) from error
        raise
    shutil.rmtree(aside, ignore_errors=True)


def put_back(staging: Path, folder: Path) -> bool:
    """Undo an unfinished :func:`_replace_one_by_one`.

    Returns:
        True if it had finished, so that there is nothing to undo.
    """
    aside = _old(staging)
    try:
        plan = json.loads((aside / "plan.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        plan = {"coming": [], "going": []}
    done = (aside / "done.json").exists() or (
        bool(plan["coming"]) and all(_has_arrived(staging / name, folder / name) for name in plan["coming"])
    )
    if done:
        shutil.rmtree(aside, ignore_errors=True)
        return True
    for name in reversed(plan["coming"]):
        is_new = name not in plan["going"] or os.path.lexists(aside / "files" / name)
        if is_new and os.path.lexists(folder / name):
            if os.path.lexists(staging / name):
                (folder / name).unlink()
            else:
                _rename(folder / name, staging / name)
    for name in reversed(plan["going"]):
        if os.path.lexists(aside / "files" / name):
            _rename(aside / "files" / name, folder / name)
    (aside / "plan.json").unlink(missing_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    return False


def _has_arrived(path: Path, target: Path) -> bool:
    return target.exists() and (not path.exists() or target.samefile(path))


def _rename(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)


def _link_or_rename(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except (AttributeError, NotImplementedError, OSError):  # a file system without links
        path.rename(target)


def _files_of(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _old(staging: Path) -> Path:
    """The folder for files that are replaced."""
    return staging.with_name(staging.name + _OLD)
