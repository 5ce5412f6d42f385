"""Where results go: into a new or empty folder, or over what the same command wrote there before.

A hidden file in each output says which command wrote it, and the size and hash of every file, so that what somebody
changed since then is not taken for ours. It is neither copied nor uploaded.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import inspect
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from hf_prune.errors import CheckpointError
from hf_prune.files import MARK, read_json_object, remove_leftovers, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

SAVE = "save_pretrained"

_log = logging.getLogger(__name__)
_KIND, _VERSION = "hf_prune.output", 1
_OWNER = "owner.json"
_HELD: set[tuple[int, Path]] = set()  # locks, by thread
_BLOCK, _BLOCKS = 1 << 16, 512  # bytes, and how many of a file are hashed


def check_output(
    out: str | os.PathLike[str],
    command: str,
    sources: Iterable[str | os.PathLike[str] | None] = (),
    *,
    overwrite: bool = False,
    beside: Collection[str | os.PathLike[str] | None] = (),
) -> Path:
    """Make sure that writing into a folder loses nothing, before any work.

    Args:
        out: The folder.
        command: What will write it, such as ``"prune"``.
        sources: Folders that are read; what is none, such as a Hub id, is passed over.
        overwrite: Whether what is in the way may be replaced. A source never is.
        beside: Folders inside that belong to the same run.

    Returns:
        The folder.

    Raises:
        CheckpointError: If it is a file; is, holds or lies in a source; or holds something that is not an earlier
            output of this command as it was written.
    """
    folder = Path(out)
    refuse_file(folder)
    for source in sources:
        if source is not None and os.path.isdir(source):
            _refuse_source(folder, Path(source))
    if overwrite or not folder.is_dir():
        return folder
    own = {Path(each).resolve() for each in beside if each is not None}
    found = sorted(path.name for path in folder.iterdir() if path.resolve() not in own)
    if not found:
        return folder
    mark = _read_mark(folder)
    some = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    remedy = "name a new or empty folder, or pass --overwrite (overwrite=True) to replace what is in the way"
    if mark is None:
        raise CheckpointError(f"{folder} holds {some}, which hf-prune {command} did not write: {remedy}")
    if mark["command"] != command:
        raise CheckpointError(f"{folder} was written by {_said(mark)}, not by hf-prune {command}: {remedy}")
    if changed := sorted(name for name in mark["files"] if _is_changed(folder / name, mark["files"][name])):
        raise CheckpointError(
            f"{folder} was changed since hf-prune {command} wrote it, see {', '.join(changed[:3])}: {remedy}"
        )
    return folder


def check_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Make sure that writing a file loses nothing, before any work.

    Raises:
        CheckpointError: If it is a folder, or there already.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: expected a file to write")
    if os.path.lexists(path) and not overwrite:
        raise CheckpointError(f"{path} is there already: name another file, or pass --overwrite (overwrite=True)")
    return path


def say_replaced(folder: Path, names: Iterable[str]) -> None:
    """Tell which files a command replaces, of those that it writes."""
    if replaced := sorted(name for name in names if os.path.lexists(folder / name)):
        _log.warning("Replaced in %s: %s.", folder, ", ".join(replaced))


def source_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint.

    Raises:
        CheckpointError: If it is none.
    """
    if not os.path.isdir(source):
        raise CheckpointError(f"{os.fspath(source)} is no folder: expected one with config.json and model.safetensors")
    return Path(source)


def refuse_file(folder: str | os.PathLike[str]) -> None:
    """Make sure that a folder's name is not that of a file.

    Raises:
        CheckpointError: If it is.
    """
    if Path(folder).is_file():
        raise CheckpointError(f"{os.fspath(folder)} is a file: expected a folder to save into")


def _refuse_source(folder: Path, source: Path) -> None:
    """By whatever names: links, relative paths, mounts."""
    there, read = Path(os.path.realpath(folder)), Path(os.path.realpath(source))
    if there.exists() and there.samefile(read):
        raise CheckpointError(f"{folder} would replace itself: name another folder")
    if _is_within(there, read):
        raise CheckpointError(f"{folder} lies in {source}, which is read: name a folder elsewhere")
    files = (Path(os.path.realpath(path)) for path in read.iterdir())  # which may be links
    if _is_within(read, there) or any(path.is_relative_to(there) for path in files):
        raise CheckpointError(f"{folder} holds files of {source}, which is read: name a folder elsewhere")


def _is_within(path: Path, folder: Path) -> bool:
    return any(each.exists() and each.samefile(folder) for each in (path, *path.parents) if folder.exists())


# --- one writer at a time --------------------------------------------------------------------------


@contextlib.contextmanager
def output_lock(out: str | os.PathLike[str], command: str, wait: float = 0.0) -> Iterator[None]:
    """Let nobody else of ours write into a folder; what killed processes left beside it is removed, or put back.

    It is a lock of the operating system on a hidden folder beside it, and ends with the process. Within a thread
    it can be taken again. Of several processes that were launched together, only the first one writes, and takes it.
    Where there are no such locks (Windows, some network file systems) there is none.

    Args:
        out: The folder.
        command: Who writes.
        wait: Seconds to wait for another ``save_pretrained``, which is soon done.

    Raises:
        CheckpointError: If somebody else writes into it.
    """
    folder = Path(out).resolve()
    held = threading.get_ident(), folder
    if held in _HELD or fcntl is None or (command != SAVE and os.environ.get("RANK", "0") != "0"):
        yield
        return
    if not folder.name:
        raise CheckpointError(f"{folder} is the root of the file system: name a folder in it")
    path = folder.with_name(f".{folder.name}.lock")
    if path.is_symlink() or path.is_file():
        raise CheckpointError(f"{path} is in the way of a lock: expected nothing of that name; move it away")
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _acquire(path, folder, command, wait)
    _HELD.add(held)
    try:
        if lock is not None:
            remove_leftovers(folder)
        yield
    finally:
        _HELD.discard(held)
        if lock is not None:
            try:
                _remove_lock(path)
            finally:
                os.close(lock)
        with contextlib.suppress(OSError):  # where nothing was written
            for parent in made:
                parent.rmdir()


def writes_alone(command: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Have a function hold the lock of the folder that its argument ``out`` names, if it names one.

    Args:
        command: As of :func:`output_lock`.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def locked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            out = signature.bind(*args, **kwargs).arguments.get("out")
            with contextlib.nullcontext() if out is None else output_lock(out, command):
                return function(*args, **kwargs)

        return locked

    return decorate


def _acquire(path: Path, folder: Path, command: str, wait: float) -> int | None:
    """A descriptor of the locked folder; None where there are no locks."""
    end = time.monotonic() + wait
    while True:
        path.mkdir(exist_ok=True)
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # its owner has just removed it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(lock).st_ino == path.stat().st_ino:  # and nobody has removed it meanwhile
                (path / _OWNER).write_text(json.dumps({"process": os.getpid(), "command": command}), encoding="utf-8")
                return lock
        except BlockingIOError:
            owner = _owner(path)
            if (owner and owner.get("command") != SAVE) or time.monotonic() > end:
                os.close(lock)
                raise CheckpointError(
                    f"{folder} is being written by process {owner.get('process', '(unknown)')} "
                    f"({_said({'command': 'output', **owner})}): wait until it is done, or name another folder"
                ) from None
        except OSError as error:  # a file system without locks
            os.close(lock)
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            _remove_lock(path)
            return None
        except BaseException:  # Ctrl-C, say: else this process would hold it until it ends
            os.close(lock)
            raise
        os.close(lock)
        time.sleep(0.02)


def _remove_lock(path: Path) -> None:
    with contextlib.suppress(OSError):  # what else lies there is not ours
        (path / _OWNER).unlink(missing_ok=True)
        path.rmdir()


def _owner(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path / _OWNER)
    except CheckpointError:
        return {}


# --- the mark --------------------------------------------------------------------------------------


def write_mark(
    folder: Path, command: str, names: Iterable[str], kept: Mapping[str, tuple[int, str]] | None = None
) -> None:
    """Say in a finished folder which command wrote it.

    Args:
        folder: The folder.
        command: The command.
        names: Paths of the files that it wrote.
        kept: What an earlier mark says of files that stay.
    """
    files = {**(kept or {}), **{name: _stamp(folder / name) for name in names}}
    write_json(folder / MARK, {"kind": _KIND, "version": _VERSION, "command": command, "files": files})


def own_files(folder: Path) -> dict[str, tuple[int, str]]:
    """The files of an output that are as we wrote them, and how they are recognized."""
    mark = _read_mark(folder)
    files = {} if mark is None else mark["files"]
    return {n: said for n, said in files.items() if (folder / n).is_file() and not _is_changed(folder / n, said)}


def _read_mark(folder: Path) -> dict[str, Any] | None:
    """What a mark says; None without one, or where it is damaged."""
    try:
        mark = read_json_object(folder / MARK)
        said = mark["kind"], mark["version"]
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in mark["files"].items()}
    except (AttributeError, CheckpointError, KeyError, TypeError, ValueError):
        return None
    outside = any(os.path.isabs(name) or ".." in Path(name).parts for name in files)
    return None if said != (_KIND, _VERSION) or outside else {"command": str(mark.get("command")), "files": files}


def _said(mark: Mapping[str, Any]) -> str:
    command = mark["command"]
    return command if command == SAVE else f"hf-prune {command}"


def _stamp(path: Path) -> tuple[int, str]:
    """Size and hash of a file; of a large one, of blocks that are spread over it, which takes no time.

    Without the time of the file, equal outputs have equal marks, and a copy of an output is one as well.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(blocks := min(-(-size // _BLOCK), _BLOCKS)):
            file.seek(i * _BLOCK if size <= _BLOCK * _BLOCKS else i * (size - _BLOCK) // (blocks - 1))
            digest.update(file.read(_BLOCK))
    return size, digest.hexdigest()


def _is_changed(path: Path, said: tuple[int, str]) -> bool:
    """Whether a file is there and another one than was written."""
    return path.is_file() and (path.stat().st_size != said[0] or _stamp(path) != said)
