"""Data files in a local folder: which files are which split, and how each type is read."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.data.media import read_media
from hf_prune.evaluation.data.text_format import (
    SAMPLE,
    encoding_of,
    find_quote,
    find_separator,
    long_fields,
    not_decoded,
)

if TYPE_CHECKING:
    from datasets import Dataset

TABLES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
_SUBFOLDERS = ("", "data", "SST-2", "sst2")
_SPLIT_ALIASES = ("validation", "dev", "val", "valid")
_DATA_FILE = re.compile(r"(?P<split>\w+?)(-\d{5}-of-(?P<shards>\d{5}))?\.(?P<format>tsv|csv|jsonl|json|parquet)")
_SETTINGS = re.compile(r".*(config|info|infos|state|report|index|map)\.json")  # JSON files that are no data
_TEXT_FILE = re.compile(r"(wiki\.)?(?P<split>\w+)\.(txt|raw|tokens)")
_WIKITEXT_FILE = re.compile(r"wiki\..*\.(raw|tokens)")


def load_folder(folder: Path, split: str) -> Dataset:
    """One split of a folder with tables.

    Raises:
        DataError: If there is no such split, or its files cannot be read.
    """
    files = data_files(folder)
    if not files:
        splits = read_media(folder)
        return splits[resolve_split(split, list(splits), repr(str(folder)))]
    name = resolve_split(split, list(files), repr(str(folder)))
    return read_tables(_one_set(files[name], name))


def data_files(folder: Path) -> dict[str, list[Path]]:
    """The data files by split, of the first subfolder that has any."""
    for subfolder in _SUBFOLDERS:
        files: dict[str, list[Path]] = {}
        for path in sorted((folder / subfolder).glob("*")):
            if _SETTINGS.fullmatch(path.name):
                continue
            if (match := _DATA_FILE.fullmatch(path.name)) and path.is_file():
                files.setdefault(match["split"], []).append(path)
        if files:
            return files
    return {}


def text_files(folder: Path) -> dict[str, Path]:
    """The text files by split, of the first subfolder that has any.

    Raises:
        DataError: If two files are the same split.
    """
    for subfolder in _SUBFOLDERS[:2]:
        files: dict[str, Path] = {}
        for path in sorted((folder / subfolder).glob("*")):
            if (match := _TEXT_FILE.fullmatch(path.name)) and path.is_file():
                if (other := files.setdefault(match["split"], path)) != path:
                    raise DataError(
                        f"split {match['split']!r} is in {path.parent} more than once ({other.name}, {path.name}): "
                        f"pass one of the files, or keep one of them"
                    )
        if files:
            return files
    return {}


def _one_set(paths: list[Path], split: str) -> list[Path]:
    """Check that the files of a split are one file, or all shards of one set."""
    matches = [match for path in paths if (match := _DATA_FILE.fullmatch(path.name))]
    kinds = {(match["format"], match["shards"]) for match in matches}
    names = ", ".join(path.name for path in paths)
    if len(kinds) > 1:
        raise DataError(f"split {split!r} is in {paths[0].parent} more than once ({names}): keep one of them")
    expected = int(matches[0]["shards"] or 1)
    if len(paths) != expected:
        raise DataError(f"split {split!r} in {paths[0].parent} has {len(paths)} of {expected} files: found {names}")
    return paths


def same_split(one: str, other: str) -> bool:
    """Whether two names mean the same split."""
    return one == other or {one, other} <= set(_SPLIT_ALIASES)


def refuse_same_split(source: str, one: str, other: str, doing: str, why: str) -> None:
    """Make sure that two splits are not the same data.

    Args:
        source: A file, which is a single split, or a folder or Hub id.
        one: The first split.
        other: The second split.
        doing: What would be done with both, for the message.
        why: Why they must differ, for the message.

    Raises:
        ConfigError: If they are the same.
    """
    if os.path.isfile(source):
        raise ConfigError(
            f"the file {source!r} is {doing}: expected two splits, so pass a folder with a file for each, such as "
            f"train.tsv and dev.tsv; {why}"
        )
    if same_split(one, other):
        raise ConfigError(f"the split {one!r} is {doing}: expected two; {why}")


def resolve_split(split: str, available: Sequence[str], where: str) -> str:
    """The name by which a source has a split; ``validation``, ``dev``, ``val`` and ``valid`` mean the same.

    Raises:
        DataError: If it does not have it; ``where`` names the source in the message.
    """
    if split in available:
        return split
    for alias in _SPLIT_ALIASES if split in _SPLIT_ALIASES else ():
        if alias in available:
            return alias
    raise DataError(f"no split {split!r} in {where}: it has {', '.join(sorted(available))}")


def read_tables(paths: list[Path]) -> Dataset:
    """The rows of TSV, CSV, JSONL or parquet files, one after the other.

    Raises:
        DataError: If a file cannot be read, or their columns differ.
    """
    from datasets import Dataset

    kind = paths[0].suffix
    if kind == ".parquet":
        return _read_parquet(paths)
    columns: dict[str, list[Any]] = {}
    for path in paths:
        try:
            read = {".jsonl": _read_jsonl, ".json": _read_json}.get(kind)
            part = _read_table(path, tabs=kind == ".tsv") if read is None else read(path)
        except UnicodeError as error:
            raise not_decoded(path, kind[1:].upper(), error) from error
        except (OSError, csv.Error) as error:
            raise DataError(f"{path} cannot be read as {kind[1:].upper()}: {error}") from error
        if not part and kind != ".json":
            raise DataError(f"{path} is empty: expected {'objects, one a line' if read else 'a header, and rows'}")
        if columns and list(part) != list(columns):
            raise DataError(f"{path} has the columns {', '.join(part)}, but {paths[0].name} has {', '.join(columns)}")
        columns = {name: columns.get(name, []) + values for name, values in part.items()}
    try:
        return Dataset.from_dict(columns)
    except (ValueError, TypeError) as error:  # ArrowInvalid and ArrowTypeError: JSON values of mixed types
        raise DataError(f"{paths[0]}: a column mixes types ({error}): write text and labels as strings") from error


def read_text(path: Path) -> list[str]:
    """A text file as one text; a file of WikiText line by line."""
    try:
        with path.open(encoding=encoding_of(path)) as file:
            if _WIKITEXT_FILE.fullmatch(path.name):
                return [line if line.strip() else "" for line in file]
            return [file.read()]
    except UnicodeError as error:
        raise not_decoded(path, "text", error) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_parquet(paths: list[Path]) -> Dataset:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
    from datasets import Dataset

    try:
        return Dataset(pa.concat_tables([pq.read_table(path) for path in paths]))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{paths[0]} cannot be read as parquet: {error}") from error


def _read_table(path: Path, *, tabs: bool) -> dict[str, list[Any]]:
    """Columns of a TSV file, in which quotes have no meaning, or of a CSV file, whatever separates its fields."""
    with path.open(encoding=encoding_of(path), newline="") as file, long_fields():
        if tabs:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            sample = file.read(SAMPLE)
            file.seek(0)
            between = find_separator(sample)
            quotes = find_quote(sample, between)
            reader = csv.reader(file, delimiter=between, quotechar=quotes, skipinitialspace=True)
        header = next(reader, [])
        rows: list[list[str]] = []
        lines = list(reader)
        while lines and (not lines[-1] or (len(header) > 1 and not "".join(lines[-1]).strip())):
            lines.pop()  # blank lines at the end
        for number, fields in enumerate(lines, start=1):
            if len(fields) != len(header):
                raise DataError(
                    f"row {number} of {path} has {len(fields)} fields, but the header has {len(header)} "
                    f"({', '.join(header)}): repair that row"
                )
            rows.append(fields)
    return {name: [fields[i] for fields in rows] for i, name in enumerate(header)}


def _read_jsonl(path: Path) -> dict[str, list[Any]]:
    """Columns of a file with one JSON object a line; None where an object lacks a key."""
    rows: list[dict[str, Any]] = []
    with path.open(encoding=encoding_of(path)) as file:
        lines = list(file)
        while lines and not lines[-1].strip():
            lines.pop()
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except (RecursionError, ValueError) as error:
                raise DataError(f"row {number} of {path} is not JSON ({error}): expected one object a line") from None
            if not isinstance(row, dict):
                raise DataError(f"row {number} of {path} is {line.strip()[:40]!r}: expected a JSON object")
            rows.append(row)
    return _columns(rows)


def _read_json(path: Path) -> dict[str, list[Any]]:
    """Columns of a file with a JSON list of objects, or an object that has one under ``data``; or with JSON lines."""
    text = path.read_bytes().decode(encoding_of(path))
    if not text.strip():
        raise DataError(f"{path} is empty: expected a list of objects, one a row")
    try:
        rows = json.loads(text)
    except (RecursionError, ValueError):
        return _read_jsonl(path)  # which names the row that is none
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if isinstance(rows, dict):
        return _read_jsonl(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} holds a JSON {type(rows).__name__}: expected a list of objects, one a row")
    return _columns(rows)


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
