"""How a text file is written, which its name does not tell: encoding, separator and quotes."""

from __future__ import annotations

import codecs
import csv
import io
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_prune.errors import DataError

SAMPLE = 1 << 16  # characters at the start of a file
_SEPARATORS = (",", ";", "\t", "|")


def find_separator(text: str) -> str:
    """What separates the fields of a CSV file: what its header has most of, outside of quotes."""
    header = text.partition("\n")[0]
    header = re.sub(r"'[^']*'" if header.startswith("'") else r'"[^"]*"', "", header)
    return max(_SEPARATORS, key=lambda mark: (header.count(mark), mark == ","))


def find_quote(text: str, separator: str) -> str:
    """What a CSV file is quoted with: single quotes only if they are around a field of every row, and parse as such."""
    sample = text if len(text) < SAMPLE else text[: text.rfind("\n") + 1]
    edge = re.escape(separator)
    if re.search(rf'(?:^|{edge}) *"', sample, re.MULTILINE):
        return '"'
    lines = io.StringIO(sample, newline="")
    try:
        rows = [
            row
            for row in csv.reader(lines, delimiter=separator, quotechar="'", skipinitialspace=True, strict=True)
            if row
        ]
    except csv.Error:
        return '"'
    fields = re.findall(rf"(?:^|{edge}) *'(?:[^']|'')*'(?= *(?:{edge}|\r?$))", sample, re.MULTILINE)
    return "'" if len(rows) > 1 and len({*map(len, rows)}) == 1 and len(fields) >= len(rows) - 1 else '"'


def encoding_of(path: Path) -> str:
    """The encoding of a text file, by the mark at its start: Excel's "Unicode text" is UTF-16. UTF-8 without one."""
    with path.open("rb") as file:
        start = file.read(4)
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def not_decoded(path: Path, kind: str, error: UnicodeError) -> DataError:
    """The error for a file that is in another encoding than it seems to be.

    Args:
        path: The file.
        kind: What it was read as.
        error: What decoding it raised.
    """
    encoding = encoding_of(path)
    if encoding != "utf-8-sig":
        return DataError(f"{path} begins as {encoding.upper()} {kind} does, and cannot be read as such: {error}")
    return DataError(
        f"{path} cannot be read as UTF-8 {kind}: {error}; it may be Latin-1 or Windows-1252: "
        f"save it as UTF-8, or convert it: iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(path.name)}"
    )


@contextmanager
def long_fields() -> Iterator[None]:
    """Within this context, fields may be longer than the 131,072 characters that ``csv`` allows."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)
