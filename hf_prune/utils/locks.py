"""Locks, so that only one process at a time writes into an output folder."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError
from hf_prune.utils.json_files import read_json_object
from hf_prune.utils.output_folder import SAVE, Arguments, Result, describe_writer
from hf_prune.utils.staging import remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
_OWNER = "owner.json"
_HELD: set[tuple[int, Path]] = set()  # (thread, folder) of the locks that this process holds


@contextlib.contextmanager
def output_lock(out: str | os.PathLike[str], command: str, wait: float = 0.0) -> Iterator[None]:
    """Lock an output folder against other processes of hf_prune, and clean up after killed ones.

    The lock is one of the operating system, on a hidden folder beside the output, and ends with the process. A thread
    can take it again. Of several processes that were launched together, only rank 0 writes and takes it. Where the
    system has no such locks (Windows, some network file systems), this does nothing.

    Args:
        out: The folder.
        command: The command that writes.
        wait: Seconds to wait for another ``save_pretrained``, which takes a short time.

    Raises:
        CheckpointError: If another process writes into the folder.
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
        raise CheckpointError(f"{path} is a file with the name of a lock: expected no file of that name; move it away")
    created = [parent for parent in path.parents if not parent.exists()]
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
        with contextlib.suppress(OSError):  # not empty: something was written
            for parent in created:
                parent.rmdir()


def writes_alone(command: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorator: the function holds the lock of the folder in its argument ``out``, if that is given.

    Args:
        command: The command that writes, for :func:`output_lock`.
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
    """Lock a folder and return its descriptor; None where the file system has no locks."""
    end = time.monotonic() + wait
    while True:
        path.mkdir(exist_ok=True)
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # its owner has just removed it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(lock).st_ino == path.stat().st_ino:  # not removed in the meantime
                (path / _OWNER).write_text(json.dumps({"process": os.getpid(), "command": command}), encoding="utf-8")
                return lock
        except BlockingIOError:
            owner = _read_owner(path)
            if (owner and owner.get("command") != SAVE) or time.monotonic() > end:
                os.close(lock)
                raise CheckpointError(
                    f"{folder} is being written by process {owner.get('process', '(unknown)')} "
                    f"({describe_writer({'command': 'output', **owner})}): wait until it is done, or name another "
                    f"folder"
                ) from None
        except OSError as error:  # a file system without locks
            os.close(lock)
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            _remove_lock(path)
            return None
        except BaseException:  # Ctrl-C, for one: without this the lock would stay until the process ends
            os.close(lock)
            raise
        os.close(lock)
        time.sleep(0.02)


def _remove_lock(path: Path) -> None:
    with contextlib.suppress(OSError):  # other files in it are not ours
        (path / _OWNER).unlink(missing_ok=True)
        path.rmdir()


def _read_owner(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path / _OWNER)
    except CheckpointError:
        return {}
