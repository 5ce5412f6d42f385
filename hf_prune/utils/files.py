"""Files that appear complete or not at all, and texts read up to a limit."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_prune.errors import DataError

LARGEST_TEXT = 1 << 21  # bytes of a text by somebody else; a card with hundreds of results has a tenth of this


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file that replaces ``path`` when the block ends without an error.

    Args:
        path: The file to write; its folder is created if needed. A link is replaced, not followed.
    """
    path = Path(path)
    path = path.parent.resolve() / path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def read_text(path: str | os.PathLike[str], *, most: int = LARGEST_TEXT, errors: str = "strict") -> str:
    r"""Read a text file that others may have written, without a byte order mark and with ``\n`` as line ends.

    Args:
        path: The file.
        most: Largest size in bytes; no more is read.
        errors: How bytes that are not UTF-8 are treated, as in ``bytes.decode``.

    Raises:
        DataError: If the file is larger, or not in UTF-8.
    """
    with Path(path).open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        size = max(len(data), os.stat(path).st_size)
        raise DataError(f"{os.fspath(path)} has {size:,} bytes: expected a text of at most {most:,}")
    try:
        text = data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise DataError(f"{os.fspath(path)} is not in UTF-8: {error.reason}; save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def write_json(path: str | os.PathLike[str], values: Any) -> Path:
    """Write a JSON file atomically."""
    return write_text(path, json.dumps(values, indent=2) + "\n")


def sync(path: Path) -> None:
    """Make the operating system write a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def temporary_beside(path: Path) -> Path:
    """An unused hidden name in the same folder, so that a rename stays on one file system."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
