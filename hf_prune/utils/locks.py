"""One writer per output folder."""

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
from hf_prune.utils.output_folder import SAVE, Arguments, Result, describe_save
from hf_prune.utils.staging import remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
_OWNER = "owner.json"
_HELD: set[tuple[int, Path]] = set()  # locks, by thread


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
                    f"({describe_save({'command': 'output', **owner})}): wait until it is done, or name another folder"
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
