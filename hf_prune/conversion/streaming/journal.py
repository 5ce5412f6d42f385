"""The unfinished result of a long run: a hidden folder beside the output, with a journal of the steps that are done.

Each line of the journal is a JSON object with a checksum, and is on the disk before the next step begins. A line that
was cut off or damaged is ignored, with all lines after it. The first line identifies the run by its inputs; only a run
with the same inputs continues it.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError
from hf_prune.utils.files import sync
from hf_prune.utils.formatting import first_few
from hf_prune.utils.staging import put_back

_FORMAT = 3
_JOURNAL, _NEW = "journal.jsonl", "journal.new"
_OWN = (
    "checkpoint",
    "checkpoint.old",
    "scratch",
    "repaired",
    "masks.bits",
    _JOURNAL,
    _NEW,
)  # what the folder may contain
_TYPES = {
    "changes": dict,
    "copied": list,
    "curves": dict,
    "files": list,
    "folder": list,
    "found": list,
    "kept": dict,
    "placing": list,
    "repaired": dict,
    "sizes": dict,
    "scores": dict,
    "sparsities": dict,
    "tensors": dict,
    "without": list,
}


class Journal:
    """The journal of an unfinished result.

    Args:
        out: The output folder.

    Attributes:
        folder: The hidden folder beside the output.
        staging: The folder in it that becomes the output.
        scratch: A folder in it for temporary files.
        key: The inputs of the run, as passed to :meth:`begin`.
        records: One entry for each finished step.

    Raises:
        CheckpointError: If something else has the name of the hidden folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out = out.resolve()
        self.folder = out.with_name(f".{out.name}.partial")
        self.staging = self.folder / "checkpoint"
        self.scratch = self.folder / "scratch"
        self._refuse_foreign_files()
        self.key, self.records = self._read()

    def _refuse_foreign_files(self) -> None:
        """Make sure that hf_prune wrote the hidden folder, since it is deleted in the end."""
        if not os.path.lexists(self.folder):
            return
        foreign = "not a folder"
        if self.folder.is_dir() and not self.folder.is_symlink():
            foreign = first_few(sorted(path.name for path in self.folder.iterdir() if path.name not in _OWN))
        if foreign:
            raise CheckpointError(
                f"{self.folder} is needed for the unfinished result, and hf_prune did not write what is there "
                f"({foreign}): move it away, or name another output"
            )

    def _read(self) -> tuple[dict[str, str], list[dict[str, Any]]]:
        records: list[dict[str, Any]] = []
        self._end = 0  # of the valid lines, in bytes
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
            records.append(record)
            self._end += len(line)
        if not records or records[0].pop("format", None) != _FORMAT:
            return {}, []
        return records[0], records[1:]

    def begin(self, key: Mapping[str, str], restart: bool = False) -> None:
        """Continue an interrupted run with the same inputs, or start a new one.

        Args:
            key: The inputs: a short text for each, such as a checksum, by name.
            restart: Start again in any case.

        Raises:
            CheckpointError: If there is an unfinished result of a run with other inputs.
        """
        if self.key and not restart:
            self.check(key)
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
            self._drop_invalid_lines()
            return
        self.remove()
        self.staging.mkdir(parents=True)
        self.scratch.mkdir()
        self.key, self.records = dict(key), []
        self._append({"format": _FORMAT, **key})

    def check(self, key: Mapping[str, str]) -> None:
        """Make sure that an unfinished result, if there is one, has the same inputs.

        Args:
            key: As for :meth:`begin`, or a part of it.

        Raises:
            CheckpointError: If it has other inputs.
        """
        if self.key and (different := [name for name, value in key.items() if self.key.get(name) != value]):
            raise CheckpointError(
                f"{self.folder} holds an unfinished result of another run, which differs in "
                f"{' and '.join(different)}: repeat that run to finish it, pass restart=True (--restart) to start "
                f"again, or delete the folder"
            )

    def _drop_invalid_lines(self) -> None:
        """Cut off invalid lines at the end, so that the next line is not appended to them."""
        path = self.folder / _JOURNAL
        if self._end < path.stat().st_size:
            os.truncate(path, self._end)

    def add(self, record: dict[str, Any], *written: Path) -> None:
        """Record that a step is done, after the files that it wrote are on the disk."""
        for path in written:
            sync(path)
        self._append(record)
        self.records.append(record)

    def _append(self, record: Mapping[str, Any]) -> None:
        with (self.folder / _JOURNAL).open("ab") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def forget(self, kinds: Collection[str]) -> None:
        """Start the steps of some kinds again, and keep the others."""
        left = [record for record in self.records if not record.keys() & kinds]
        path = self.folder / _JOURNAL
        new = self.folder / _NEW
        new.write_bytes(b"".join(_line(record) for record in ({"format": _FORMAT, **self.key}, *left)))
        sync(new)
        os.replace(new, path)
        self.records = left

    def remove(self) -> None:
        """Delete the hidden folder, after putting back files that were moved out of the output folder."""
        if self.folder.exists():
            put_back(self.staging, self.out)
            shutil.rmtree(self.folder)
        self.key, self.records = {}, []


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record).encode()
    return text + b" " + _checksum(text)


def _checksum(text: bytes) -> bytes:
    """The end of a line, after a space."""
    return f"{zlib.crc32(text):08x}\n".encode()
