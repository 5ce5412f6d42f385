"""Where large temporary files go: to a disk, since a folder in memory (tmpfs) would save none."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

from hf_prune.utils.notices import warn_user

_MOUNTS = Path("/proc/self/mounts")  # of Linux; other systems have no such folders by default
_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
_ASKED = ("TMPDIR", "TEMP", "TMP")  # in the order in which tempfile looks at them


def scratch_folder() -> str:
    """A folder on a disk for temporary files: that of the system, if it is on one, or else ``/var/tmp`` or the cache.

    A folder that ``TMPDIR`` names is taken as it is. Warns if it, or all there are, lie in memory.
    """
    chosen = tempfile.gettempdir()
    if not is_in_memory(chosen):
        return chosen
    asked = next((name for name in _ASKED if os.path.realpath(os.environ.get(name) or "/") == _real(chosen)), None)
    if asked is None:
        for folder in ("/var/tmp", os.path.expanduser("~/.cache")):
            if os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK) and not is_in_memory(folder):
                return folder
    _warn_once(chosen, asked)
    return chosen


def is_in_memory(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder lies in memory, as ``/dev/shm`` does and on some systems ``/tmp``."""
    real = Path(_real(folder))
    kind, longest = "", -1
    try:
        with _MOUNTS.open(errors="replace") as file:
            lines = file.readlines()
    except OSError:
        return False
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(fields[1].replace("\\040", " "))
        if len(point.parts) >= longest and (real == point or point in real.parents):  # a later mount hides one before
            kind, longest = fields[2], len(point.parts)
    return kind in _IN_MEMORY


def _real(folder: str | os.PathLike[str]) -> str:
    return os.path.realpath(folder)


@functools.cache
def _warn_once(folder: str, asked: str | None) -> None:
    why = "no folder on a disk was found" if asked is None else f"{asked} says so"
    warn_user(
        f"temporary files go to {folder}, which lies in memory ({why}), so what is put there to save memory saves "
        f"none: set TMPDIR to a folder on a disk"
    )
