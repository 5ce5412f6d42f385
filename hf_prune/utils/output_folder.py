"""Output folders: new, empty, or an earlier output of the same command.

A hidden mark in each output names the command that wrote it, and the size and hash of every file, so that files that
somebody changed since then are not taken for ours. The mark is neither copied nor uploaded.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from hf_prune.errors import CheckpointError
from hf_prune.utils.files import write_json
from hf_prune.utils.folders import MARK
from hf_prune.utils.json_files import read_json_object

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
SAVE = "save_pretrained"
_log = logging.getLogger(__name__)
_KIND, _VERSION = "hf_prune.output", 1
_BLOCK, _BLOCKS = 1 << 16, 512  # bytes of a block, and most blocks of a file that are hashed


def check_output(
    out: str | os.PathLike[str],
    command: str,
    sources: Iterable[str | os.PathLike[str] | None] = (),
    *,
    overwrite: bool = False,
    beside: Collection[str | os.PathLike[str] | None] = (),
) -> Path:
    """Make sure, before any work, that writing into a folder loses nothing.

    Args:
        out: The folder.
        command: The command that will write, such as ``"prune"``.
        sources: Folders that are read; Hub ids and None are ignored.
        overwrite: Whether existing files may be replaced. Those of a source never are.
        beside: Folders inside ``out`` that belong to the same run.

    Returns:
        The folder.

    Raises:
        CheckpointError: If it is a file; is a source, contains one or is inside one; or contains anything but an
            unchanged output of the same command.
    """
    folder = Path(out)
    refuse_file(folder)
    for source in sources:
        if source is not None and os.path.isdir(source):
            _refuse_source(folder, Path(source))
    if overwrite or not folder.is_dir():
        return folder
    same_run = {Path(path).resolve() for path in beside if path is not None}
    existing = sorted(path.name for path in folder.iterdir() if path.resolve() not in same_run)
    if not existing:
        return folder
    mark = _read_mark(folder)
    some = ", ".join(existing[:3]) + (f" and {len(existing) - 3} more" if len(existing) > 3 else "")
    remedy = "name a new or empty folder, or pass --overwrite (overwrite=True) to replace what is in the way"
    if mark is None:
        raise CheckpointError(f"{folder} holds {some}, which hf-prune {command} did not write: {remedy}")
    if mark["command"] != command:
        raise CheckpointError(f"{folder} was written by {describe_writer(mark)}, not by hf-prune {command}: {remedy}")
    if changed := sorted(name for name in mark["files"] if _is_changed(folder / name, mark["files"][name])):
        raise CheckpointError(
            f"{folder} was changed since hf-prune {command} wrote it, see {', '.join(changed[:3])}: {remedy}"
        )
    return folder


def check_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Make sure, before any work, that writing a file loses nothing.

    Raises:
        CheckpointError: If it is a folder, or exists already.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: expected a file to write")
    if os.path.lexists(path) and not overwrite:
        raise CheckpointError(f"{path} exists already: name another file, or pass --overwrite (overwrite=True)")
    return path


def warn_replaced(folder: Path, names: Iterable[str]) -> None:
    """Log which of the files that a command writes or deletes exist already."""
    if replaced := sorted(name for name in names if os.path.lexists(folder / name)):
        _log.warning("Replaced in %s: %s.", folder, ", ".join(replaced))


def source_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint to read.

    Raises:
        CheckpointError: If it is not a folder.
    """
    if not os.path.isdir(source):
        raise CheckpointError(
            f"{os.fspath(source)} is not a folder: expected one with config.json and model.safetensors"
        )
    return Path(source)


def refuse_file(folder: str | os.PathLike[str]) -> None:
    """Make sure that the path of a folder is not a file.

    Raises:
        CheckpointError: If it is.
    """
    if Path(folder).is_file():
        raise CheckpointError(f"{os.fspath(folder)} is a file: expected a folder to save into")


def _refuse_source(folder: Path, source: Path) -> None:
    """Compare places on the disk rather than names: links, relative paths and mounts may differ."""
    target, read = Path(os.path.realpath(folder)), Path(os.path.realpath(source))
    if target.exists() and target.samefile(read):
        raise CheckpointError(f"{folder} would replace itself: name another folder")
    if _is_within(target, read):
        raise CheckpointError(f"{folder} is inside {source}, which is read: name a folder elsewhere")
    files = (Path(os.path.realpath(path)) for path in read.iterdir())  # the files may be links
    if _is_within(read, target) or any(path.is_relative_to(target) for path in files):
        raise CheckpointError(f"{folder} holds files of {source}, which is read: name a folder elsewhere")


def _is_within(path: Path, folder: Path) -> bool:
    return any(parent.exists() and parent.samefile(folder) for parent in (path, *path.parents) if folder.exists())


def write_mark(
    folder: Path, command: str, names: Iterable[str], kept: Mapping[str, tuple[int, str]] | None = None
) -> None:
    """Write the mark of a command into its finished output.

    Args:
        folder: The folder.
        command: The command.
        names: Paths of the files that it wrote.
        kept: Stamps of other files, from an earlier mark.
    """
    files = {**(kept or {}), **{name: _stamp(folder / name) for name in names}}
    write_json(folder / MARK, {"kind": _KIND, "version": _VERSION, "command": command, "files": files})


def own_files(folder: Path) -> dict[str, tuple[int, str]]:
    """The files of an output that are as hf_prune wrote them, with their stamps."""
    mark = _read_mark(folder)
    files = {} if mark is None else mark["files"]
    return {n: stamp for n, stamp in files.items() if (folder / n).is_file() and not _is_changed(folder / n, stamp)}


def _read_mark(folder: Path) -> dict[str, Any] | None:
    """The command and the file stamps in a mark; None if it is missing, damaged or of another version."""
    try:
        mark = read_json_object(folder / MARK)
        kind = mark["kind"], mark["version"]
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in mark["files"].items()}
    except (AttributeError, CheckpointError, KeyError, TypeError, ValueError):
        return None
    outside = any(os.path.isabs(name) or ".." in Path(name).parts for name in files)
    return None if kind != (_KIND, _VERSION) or outside else {"command": str(mark.get("command")), "files": files}


def describe_writer(mark: Mapping[str, Any]) -> str:
    """What a user would call the command that wrote an output."""
    command = mark["command"]
    return command if command == SAVE else f"hf-prune {command}"


def _stamp(path: Path) -> tuple[int, str]:
    """Size and hash of a file; of a large one only blocks spread over it are hashed, to save time.

    It does not contain the file's time, so equal outputs have equal marks, and a copy of an output is an output.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(blocks := min(-(-size // _BLOCK), _BLOCKS)):
            file.seek(i * _BLOCK if size <= _BLOCK * _BLOCKS else i * (size - _BLOCK) // (blocks - 1))
            digest.update(file.read(_BLOCK))
    return size, digest.hexdigest()


def _is_changed(path: Path, stamp: tuple[int, str]) -> bool:
    """Whether a file exists with other content than its stamp says."""
    return path.is_file() and (path.stat().st_size != stamp[0] or _stamp(path) != stamp)
