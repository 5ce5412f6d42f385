"""Folders that take the place of others all at once, or not at all."""

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
_LIVE: set[Path] = set()  # hidden folders that this process works in


@contextlib.contextmanager
def staged_folder(
    folder: str | os.PathLike[str], stale: Sequence[str] = (), last: Sequence[str] = ()
) -> Iterator[Path]:
    """A temporary folder whose files move into ``folder`` when the block ends without an error.

    A new folder appears by one rename. An existing one is exchanged for the new one by one rename as well where the
    system can do that (Linux); files that the block did not write stay unless ``stale`` names them. Elsewhere, files
    are replaced one by one; an error on the way puts the old ones back, and a reader that needs a file of ``last`` to
    make sense of the others sees the old set, no complete set, or the new set, never a mixture. If the process is
    killed on the way, the next one that writes there puts the old ones back; until then the new files lie whole in a
    hidden folder beside it, and the old ones in another.

    Modes, owners, groups and times of folders stay, and so do modes and owners of the files that are replaced.

    Args:
        folder: Where the files belong.
        stale: Glob patterns of files that go if the block did not write them; read when it ends.
        last: Glob patterns of files that are taken away before anything is replaced, and arrive after it, in this
            order; what arrives last goes first; read when the block ends.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder) as staging:
        yield staging
        place_folder(staging, folder, stale, last)


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside another one, which is gone afterwards; unless it holds what could not be put back."""
    scratch = temporary_beside(folder)
    scratch.mkdir()
    _LIVE.add(scratch)
    try:
        yield scratch
    finally:
        _LIVE.discard(scratch)  # first: what an interrupt leaves of it is removed by the next one
        if not _old(scratch).exists():
            shutil.rmtree(scratch, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left beside a folder, and put back what they had taken out of it.

    Nobody else may be writing into the folder; see ``outputs.output_lock``.
    """
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{12}}\.tmp(?P<old>{_OLD})?")
    found = {path: match for path in folder.parent.iterdir() if (match := pattern.fullmatch(path.name))}
    for path in sorted(found, key=lambda path: found[path]["old"] is None):  # what is to be put back comes first
        if path.is_dir() and path not in _LIVE and path.with_name(path.name.removesuffix(_OLD)) not in _LIVE:
            if found[path]["old"]:
                put_back(path.with_name(path.name.removesuffix(_OLD)), folder)
            shutil.rmtree(path, ignore_errors=True)


def place_folder(staging: Path, folder: Path, stale: Sequence[str] = (), last: Sequence[str] = ()) -> None:
    """Have a folder's files move into another one, as :func:`staged_folder` says; what is left of it may go.

    Args:
        staging: What is moved, on the same file system.
        folder: Where to; made by one rename if it does not exist.
        stale: As for :func:`staged_folder`.
        last: As for :func:`staged_folder`.

    Raises:
        CheckpointError: If a folder has the name of a file; or if an error on the way could not be made good, and then
            it says where everything is.
    """
    if put_back(staging, folder):  # what an earlier call had begun
        return
    for path in _files_of(staging):
        sync(staging / path)
    if not folder.exists():
        staging.rename(folder)
        return
    new = _files_of(staging)
    for name in new:
        if (folder / name).is_dir():
            raise CheckpointError(f"{folder / name} is a folder: expected a file, or nothing, of that name")
        _resemble(staging / name, folder / name, folder)
    matches = (path for pattern in (*stale, *last) for path in folder.glob(pattern))
    gone = {path.relative_to(folder) for path in matches if not path.is_dir()}
    if not _exchange(staging, folder, gone):
        _move_into(staging, folder, gone, new, last)


def _exchange(staging: Path, folder: Path, gone: Collection[Path]) -> bool:
    """Give a folder's name to another one that has all its files but those that go; False if that cannot be done.

    What stays is in both by a hard link, so that who has a file open goes on writing to it.
    """
    if _inside(folder) or (swap := _swap_names()) is None:
        return False
    try:
        _link_missing(folder, staging, gone)
    except OSError:  # a file system without links, or a subfolder that may not be listed
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
    """Link what a folder has and another one lacks into that one, and make its folders alike.

    Raises:
        OSError: If not everything can be listed, linked, or be made alike.
    """

    def refuse(error: OSError) -> None:
        raise error

    folders = []
    for place, subfolders, files in os.walk(source, onerror=refuse):
        here = Path(place)
        folders.append(here)
        (target / here.relative_to(source)).mkdir(exist_ok=True)
        for name in (*files, *(each for each in subfolders if (here / each).is_symlink())):
            path = (here / name).relative_to(source)
            if path not in gone and not os.path.lexists(target / path):
                os.link(source / path, target / path, follow_symlinks=False)
    for here in reversed(folders):  # whose times change with what is put into them
        there = target / here.relative_to(source)
        _give(there, here)
        shutil.copystat(here, there)


def _give(path: Path, model: Path) -> None:
    """Have a file or folder belong to whom another one belongs."""
    wanted, found = model.stat(), path.stat()
    if hasattr(os, "chown") and (wanted.st_uid, wanted.st_gid) != (found.st_uid, found.st_gid):
        os.chown(path, wanted.st_uid, wanted.st_gid)


def _resemble(new: Path, old: Path, folder: Path) -> None:
    """Give a file the mode and owner of the one that it replaces, or else the group of a setgid folder."""
    with contextlib.suppress(PermissionError):  # of somebody else's, who let us write
        if old.is_file() and not old.is_symlink():
            _give(new, old)
            shutil.copymode(old, new)
        elif hasattr(os, "chown") and folder.stat().st_mode & stat.S_ISGID:
            os.chown(new, -1, folder.stat().st_gid)


def _swap_names() -> Callable[[Path, Path], bool] | None:
    """Exchanges the names of two folders in one step: ``renameat2`` of Linux."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return lambda a, b: rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _move_into(staging: Path, folder: Path, gone: Collection[Path], new: Sequence[Path], last: Sequence[str]) -> None:
    """Replace a folder's files one by one; the old ones are put aside until all is done.

    The new ones stay in ``staging`` as well, by hard links, so that whatever happens one of the two is whole.
    """
    rank = {name: i for i, pattern in enumerate(last, start=1) for name in {*gone, *new} if name.match(pattern)}

    def order(name: Path) -> tuple[int, Path]:
        return rank.get(name, 0), name

    going = sorted((name for name in {*gone, *new} if os.path.lexists(folder / name)), key=order, reverse=True)
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
                f"{folder} could not be written ({error!r}), and the files taken out of it could not be put back "
                f"({again!r}): they are in {aside / 'files'}, and the new ones are in {staging} and {folder}"
            ) from error
        raise
    shutil.rmtree(aside, ignore_errors=True)


def put_back(staging: Path, folder: Path) -> bool:
    """Undo what :func:`_move_into` did, however far it came; unless all is in its place, which is returned."""
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
        taken = name not in plan["going"] or os.path.lexists(aside / "files" / name)
        if taken and os.path.lexists(folder / name):
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
    """Where files go that are replaced from a folder."""
    return staging.with_name(staging.name + _OLD)
