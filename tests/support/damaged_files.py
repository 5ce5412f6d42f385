"""Files that are changed under a test's hands."""

from __future__ import annotations

from pathlib import Path

from hf_prune.utils.files import atomic_path


def replace_bytes(path: Path, data: bytes) -> None:
    """Put a new file in place of one.

    ``Path.write_bytes`` would shorten the file itself. After a failed loading the threads of transformers go on
    copying from their mapping of it for a moment, and a mapping that has lost its file ends the process (SIGBUS).
    """
    with atomic_path(path) as new:
        new.write_bytes(data)
