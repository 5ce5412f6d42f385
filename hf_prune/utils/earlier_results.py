"""Results that an earlier run left in a folder: read by who wrote them, and never replaced if they are another's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hf_prune.errors import SweepError

Results = TypeVar("Results")


def own_results(path: Path, read: Callable[[Path], Results], *, overwrite: bool) -> Results | None:
    """What an earlier run of the same kind left in a file.

    Args:
        path: The file.
        read: Reads it.
        overwrite: Whether a file of something else may be replaced.

    Returns:
        What ``read`` gives; None if there is no such file, or it may be replaced.

    Raises:
        SweepError: As ``read`` raises it, if the file is of something else and may not be replaced.
    """
    try:
        return read(path) if path.is_file() else None
    except SweepError:
        if not overwrite:
            raise
        return None
