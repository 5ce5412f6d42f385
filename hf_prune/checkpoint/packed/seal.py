"""Whether packed files are whole: all of them there, and none changed. This code is also written into checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_prune.checkpoint.packed.format import FILE_VERSION, FORMAT, KEY, SUFFIX, UNSEALED
from hf_prune.errors import CheckpointError

_READ_BYTES = 1 << 18  # hashed at a time
_CHANGED = "its bytes do not match its checksum"


def is_packed(path: str | Path) -> bool:
    """Whether a safetensors file has the header of packed weights; False for a damaged file."""
    return f'\\"{FORMAT}\\"'.encode() in _first_bytes(Path(path))


def check_files(paths: Sequence[str | Path]) -> None:
    """Make sure that all files of a packed checkpoint are present, and that their headers agree.

    Their bytes are compared with their checksums by :func:`unchanged`, while they are read.

    Raises:
        CheckpointError: If one is missing, damaged, or of another format or a newer version.
    """
    dtypes: dict[str, str] = {}
    for path in map(Path, paths):
        expected = read_description(path)[0].get("tensors")
        try:
            header = json.loads(_first_bytes(path))
            dtypes |= {name: str(entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}
        except (KeyError, TypeError) as error:
            raise damaged_file(path, f"its header does not describe tensors: {error!r}") from error
    check_count(Path(paths[0]), dtypes, expected)


def check_count(path: Path, dtypes: Mapping[str, str], expected: object) -> None:
    """Make sure that all tensors are there, and no packed weight without its name, or it would be random.

    Args:
        path: One of the files.
        dtypes: Of all tensors in all files, by their names.
        expected: How many weights the files say that they have.
    """
    packed = {name for name, dtype in dtypes.items() if name.endswith(SUFFIX) and dtype == "U8"}
    alone = [name for name in sorted(packed) if name.removesuffix(SUFFIX) not in dtypes]
    if alone or len(dtypes) - len(packed) != expected:
        without = f", {alone[0]} without {alone[0].removesuffix(SUFFIX)}" if alone else ""
        raise damaged_file(path, f"the files have {len(dtypes) - len(packed)} tensors{without}, expected {expected}")


def unseal(path: Path) -> dict[str, Any]:
    """Check the checksum of a file, and return the description of the checkpoint in its header.

    Raises:
        CheckpointError: If the file was changed, or is of another format or a newer version.
    """
    description, place = read_description(path)
    _check_digest(path, place, str(description["checksum"]))
    return description


def read_description(path: Path) -> tuple[dict[str, Any], int]:
    """The description of the checkpoint in the header of a file, and the place of the checksum in the file.

    Raises:
        CheckpointError: If it has none, or is of another format or a newer version.
    """
    try:
        text = _first_bytes(path)
        header = json.loads(json.loads(text)["__metadata__"][KEY])
        kind = header["format"], header["version"]
        checksum = str(header["checksum"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: download or save the checkpoint again") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise damaged_file(path, f"its header does not describe packed weights: {error!r}") from error
    if kind != (FORMAT, FILE_VERSION):
        raise CheckpointError(
            f"{path} has format and version {kind}: expected {(FORMAT, FILE_VERSION)}; update hf_prune, or save "
            f"it again"
        )
    where = text.find(checksum.encode()) if len(checksum) == len(UNSEALED) else -1
    if where < 0:
        raise damaged_file(path, _CHANGED)
    return header, 8 + where


@contextmanager
def unchanged(paths: Sequence[str | Path]) -> Iterator[None]:
    """Compare files with their checksums while they are read within this context, so that they are read once.

    What was made of a changed file must not be used: an error within the context may come from the change, so that one
    of a checksum takes its place.

    Raises:
        CheckpointError: At the end, if a file was changed.
    """
    with ThreadPoolExecutor(1) as pool:
        checks: list[Future[None]] = []
        for path in map(Path, paths):
            description, place = read_description(path)
            checks.append(pool.submit(_check_digest, path, place, str(description["checksum"])))
        try:
            yield
        except Exception:
            for check in checks:
                check.result()
            raise
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        for check in checks:
            check.result()


def _check_digest(path: Path, place: int, checksum: str) -> None:
    """Make sure that SHA-256 of a file with zeros in place of the checksum is the checksum."""
    with path.open("rb", buffering=0) as file:
        digest = hashlib.sha256(file.read(place))
        file.seek(place + len(UNSEALED))
        digest.update(UNSEALED.encode())
        part = memoryview(bytearray(_READ_BYTES))  # reused, since allocating new memory for each part is slow
        while length := file.readinto(part):
            digest.update(part[:length])
    if digest.hexdigest() != checksum:
        raise damaged_file(path, _CHANGED)


def damaged_file(path: Path, what: str) -> CheckpointError:
    """The error for a damaged file."""
    return CheckpointError(f"{path} is damaged: {what}; download or save the checkpoint again")


def _first_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, size))
