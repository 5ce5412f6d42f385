"""The unfinished result of a long run: a hidden folder beside the output, with a journal of what is done.

Each line of the journal is a JSON object with its checksum, and is on the disk before the next step begins. A line that
was cut off by an interruption or is damaged does not count, nor does what follows it. The first line says what the
result is of; only the same run continues it.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError
from hf_prune.utils.files import sync
from hf_prune.utils.formatting import first_few
from hf_prune.utils.staging import put_back

_FORMAT = 3
_JOURNAL = "journal.jsonl"
_OWN = ("checkpoint", "checkpoint.old", "scratch", "masks.bits", _JOURNAL)
_TYPES = {"copied": list, "files": list, "folder": list, "found": list, "kept": dict, "placing": list, "tensors": dict}


class Journal:
    """A result in the making.

    Args:
        out: Where the result will be.

    Attributes:
        folder: The hidden folder beside it.
        staging: The part of it that becomes the result.
        scratch: A folder for what nobody needs later.
        key: What the result is of, as :meth:`begin` was told.
        records: What is done.

    Raises:
        CheckpointError: If something else has the name of that folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out = out.resolve()
        self.folder = out.with_name(f".{out.name}.partial")
        self.staging = self.folder / "checkpoint"
        self.scratch = self.folder / "scratch"
        self._refuse_others()
        self.key, self.records = self._read()

    def _refuse_others(self) -> None:
        """Make sure that the hidden folder is one of ours, since it is deleted in the end."""
        if not os.path.lexists(self.folder):
            return
        found = "no folder"
        if self.folder.is_dir() and not self.folder.is_symlink():
            found = first_few(sorted(path.name for path in self.folder.iterdir() if path.name not in _OWN))
        if found:
            raise CheckpointError(
                f"{self.folder} would hold the unfinished result, and hf_prune did not write what is there ({found}): "
                f"move it away, or name another output"
            )

    def _read(self) -> tuple[dict[str, str], list[dict[str, Any]]]:
        values: list[dict[str, Any]] = []
        self._end = 0  # of the lines that count
        try:
            lines = (self.folder / _JOURNAL).read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return {}, []
        for line in lines:
            text, _, checksum = line.rpartition(b" ")
            if checksum != _checksum(text):
                break
            try:
                record = json.loads(text)
            except (RecursionError, ValueError):
                break
            if not isinstance(record, dict) or not all(isinstance(record.get(k, t()), t) for k, t in _TYPES.items()):
                break
            values.append(record)
            self._end += len(line)
        if not values or values[0].pop("format", None) != _FORMAT:
            return {}, []
        return values[0], values[1:]

    def begin(self, key: Mapping[str, str], restart: bool = False) -> None:
        """Continue what an earlier run of the same left, or begin anew.

        Args:
            key: What the result is of: short texts by what they describe.
            restart: Begin anew in any case.

        Raises:
            CheckpointError: If there is an unfinished result of something else.
        """
        if self.key and not restart:
            self.check(key)
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
            self._mend()
            return
        self.remove()
        self.staging.mkdir(parents=True)
        self.scratch.mkdir()
        self.key, self.records = dict(key), []
        self._append({"format": _FORMAT, **key})

    def check(self, key: Mapping[str, str]) -> None:
        """Make sure that what an earlier run left, if anything, is of the same.

        Args:
            key: As of :meth:`begin`, or a part of it.

        Raises:
            CheckpointError: If it is of something else.
        """
        if self.key and (different := [name for name, value in key.items() if self.key.get(name) != value]):
            raise CheckpointError(
                f"{self.folder} holds an unfinished result of another run, which differs in "
                f"{' and '.join(different)}: repeat that run to finish it, pass restart=True (--restart) to begin "
                f"anew, or delete the folder"
            )

    def _mend(self) -> None:
        """Drop lines that do not count, so that the next one is not glued to them."""
        path = self.folder / _JOURNAL
        if self._end < path.stat().st_size:
            os.truncate(path, self._end)

    def add(self, record: dict[str, Any], *written: Path) -> None:
        """Say that something is done, once the files that it wrote are on the disk."""
        for path in written:
            sync(path)
        self._append(record)
        self.records.append(record)

    def _append(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(record).encode()
        with (self.folder / _JOURNAL).open("ab") as file:
            file.write(text + b" " + _checksum(text))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete it; what it was taking out of the folder of the result is put back first."""
        if self.folder.exists():
            put_back(self.staging, self.out)
            shutil.rmtree(self.folder)
        self.key, self.records = {}, []


def _checksum(text: bytes) -> bytes:
    """How a line ends, after a space."""
    return f"{zlib.crc32(text):08x}\n".encode()
