"""Where results go: into a new or empty folder, or over what the same command wrote there before.

A hidden file in each output says which command wrote it, and the size and hash of every file, so that what somebody
changed since then is not taken for ours. It is neither copied nor uploaded.
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
_BLOCK, _BLOCKS = 1 << 16, 512  # bytes, and how many of a file are hashed


def check_output(
    out: str | os.PathLike[str],
    command: str,
    sources: Iterable[str | os.PathLike[str] | None] = (),
    *,
    overwrite: bool = False,
    beside: Collection[str | os.PathLike[str] | None] = (),
) -> Path:
    """Make sure that writing into a folder loses nothing, before any work.

    Args:
        out: The folder.
        command: What will write it, such as ``"prune"``.
        sources: Folders that are read; what is none, such as a Hub id, is passed over.
        overwrite: Whether what is in the way may be replaced. A source never is.
        beside: Folders inside that belong to the same run.

    Returns:
        The folder.

    Raises:
        CheckpointError: If it is a file; is, holds or lies in a source; or holds something that is not an earlier
            output of this command as it was written.
    """
    folder = Path(out)
    refuse_file(folder)
    for source in sources:
        if source is not None and os.path.isdir(source):
            _refuse_source(folder, Path(source))
    if overwrite or not folder.is_dir():
        return folder
    own = {Path(each).resolve() for each in beside if each is not None}
    found = sorted(path.name for path in folder.iterdir() if path.resolve() not in own)
    if not found:
        return folder
    mark = _read_mark(folder)
    some = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    remedy = "name a new or empty folder, or pass --overwrite (overwrite=True) to replace what is in the way"
    if mark is None:
        raise CheckpointError(f"{folder} holds {some}, which hf-prune {command} did not write: {remedy}")
    if mark["command"] != command:
        raise CheckpointError(f"{folder} was written by {describe_save(mark)}, not by hf-prune {command}: {remedy}")
    if changed := sorted(name for name in mark["files"] if _is_changed(folder / name, mark["files"][name])):
        raise CheckpointError(
            f"{folder} was changed since hf-prune {command} wrote it, see {', '.join(changed[:3])}: {remedy}"
        )
    return folder


def check_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Make sure that writing a file loses nothing, before any work.

    Raises:
        CheckpointError: If it is a folder, or there already.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: expected a file to write")
    if os.path.lexists(path) and not overwrite:
        raise CheckpointError(f"{path} is there already: name another file, or pass --overwrite (overwrite=True)")
    return path


def say_replaced(folder: Path, names: Iterable[str]) -> None:
    """Tell which files a command replaces, of those that it writes."""
    if replaced := sorted(name for name in names if os.path.lexists(folder / name)):
        _log.warning("Replaced in %s: %s.", folder, ", ".join(replaced))


def source_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint.

    Raises:
        CheckpointError: If it is none.
    """
    if not os.path.isdir(source):
        raise CheckpointError(f"{os.fspath(source)} is no folder: expected one with config.json and model.safetensors")
    return Path(source)


def refuse_file(folder: str | os.PathLike[str]) -> None:
    """Make sure that a folder's name is not that of a file.

    Raises:
        CheckpointError: If it is.
    """
    if Path(folder).is_file():
        raise CheckpointError(f"{os.fspath(folder)} is a file: expected a folder to save into")


def _refuse_source(folder: Path, source: Path) -> None:
    """By whatever names: links, relative paths, mounts."""
    there, read = Path(os.path.realpath(folder)), Path(os.path.realpath(source))
    if there.exists() and there.samefile(read):
        raise CheckpointError(f"{folder} would replace itself: name another folder")
    if _is_within(there, read):
        raise CheckpointError(f"{folder} lies in {source}, which is read: name a folder elsewhere")
    files = (Path(os.path.realpath(path)) for path in read.iterdir())  # which may be links
    if _is_within(read, there) or any(path.is_relative_to(there) for path in files):
        raise CheckpointError(f"{folder} holds files of {source}, which is read: name a folder elsewhere")


def _is_within(path: Path, folder: Path) -> bool:
    return any(each.exists() and each.samefile(folder) for each in (path, *path.parents) if folder.exists())


def write_mark(
    folder: Path, command: str, names: Iterable[str], kept: Mapping[str, tuple[int, str]] | None = None
) -> None:
    """Say in a finished folder which command wrote it.

    Args:
        folder: The folder.
        command: The command.
        names: Paths of the files that it wrote.
        kept: What an earlier mark says of files that stay.
    """
    files = {**(kept or {}), **{name: _stamp(folder / name) for name in names}}
    write_json(folder / MARK, {"kind": _KIND, "version": _VERSION, "command": command, "files": files})


def own_files(folder: Path) -> dict[str, tuple[int, str]]:
    """The files of an output that are as we wrote them, and how they are recognized."""
    mark = _read_mark(folder)
    files = {} if mark is None else mark["files"]
    return {n: said for n, said in files.items() if (folder / n).is_file() and not _is_changed(folder / n, said)}


def _read_mark(folder: Path) -> dict[str, Any] | None:
    """What a mark says; None without one, or where it is damaged."""
    try:
        mark = read_json_object(folder / MARK)
        said = mark["kind"], mark["version"]
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in mark["files"].items()}
    except (AttributeError, CheckpointError, KeyError, TypeError, ValueError):
        return None
    outside = any(os.path.isabs(name) or ".." in Path(name).parts for name in files)
    return None if said != (_KIND, _VERSION) or outside else {"command": str(mark.get("command")), "files": files}


def describe_save(mark: Mapping[str, Any]) -> str:
    """What wrote an output, as a user would call it."""
    command = mark["command"]
    return command if command == SAVE else f"hf-prune {command}"


def _stamp(path: Path) -> tuple[int, str]:
    """Size and hash of a file; of a large one, of blocks that are spread over it, which takes no time.

    Without the time of the file, equal outputs have equal marks, and a copy of an output is one as well.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(blocks := min(-(-size // _BLOCK), _BLOCKS)):
            file.seek(i * _BLOCK if size <= _BLOCK * _BLOCKS else i * (size - _BLOCK) // (blocks - 1))
            digest.update(file.read(_BLOCK))
    return size, digest.hexdigest()


def _is_changed(path: Path, said: tuple[int, str]) -> bool:
    """Whether a file is there and another one than was written."""
    return path.is_file() and (path.stat().st_size != said[0] or _stamp(path) != said)
