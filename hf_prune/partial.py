"""The unfinished result of a long run: a hidden folder beside the output, with a journal of what is done.

Each line of the journal is a JSON object and is on the disk before the next step begins. A line that was cut off by an
interruption does not count. The first line says what the result is of; only the same run continues it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError
from hf_prune.files import sync

_FORMAT = 1
_JOURNAL = "journal.jsonl"


class Partial:
    """A result in the making.

    Args:
        out: Where the result will be.

    Attributes:
        folder: The hidden folder beside it.
        staging: The part of it that becomes the result.
        scratch: A folder for what nobody needs later.
        key: What the result is of, as :meth:`begin` was told.
        records: What is done.
    """

    def __init__(self, out: Path) -> None:
        out = out.resolve()
        self.folder = out.with_name(f".{out.name}.partial")
        self.staging = self.folder / "checkpoint"
        self.scratch = self.folder / "scratch"
        self.key, self.records = self._read()

    def _read(self) -> tuple[dict[str, str], list[dict[str, Any]]]:
        try:
            lines = (self.folder / _JOURNAL).read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return {}, []
        try:
            values = [json.loads(line) for line in lines[:-1]]  # what follows the last line break was cut off
        except ValueError:
            return {}, []
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
            if different := [name for name, value in key.items() if self.key.get(name) != value]:
                raise CheckpointError(
                    f"{self.folder} holds an unfinished result of another run, which differs in "
                    f"{' and '.join(different)}: repeat that run to finish it, pass restart=True (--restart) to begin "
                    f"anew, or delete the folder"
                )
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
            self._mend()
            return
        self.remove()
        self.staging.mkdir(parents=True)
        self.scratch.mkdir()
        self.key, self.records = dict(key), []
        self._append({"format": _FORMAT, **key})

    def _mend(self) -> None:
        """Drop a line that was cut off, so that the next one is not glued to it."""
        path = self.folder / _JOURNAL
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(path, end)

    def add(self, record: dict[str, Any], *written: Path) -> None:
        """Say that something is done, once the files that it wrote are on the disk."""
        for path in written:
            sync(path)
        self._append(record)
        self.records.append(record)

    def _append(self, record: Mapping[str, Any]) -> None:
        with (self.folder / _JOURNAL).open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete it."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.key, self.records = {}, []
