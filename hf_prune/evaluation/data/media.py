"""Folders of images or sounds, and others in a layout that ``datasets`` knows, read by it."""

from __future__ import annotations

import contextlib
import io
import tempfile
import wave
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.errors import DataError
from hf_prune.utils.formatting import listing

if TYPE_CHECKING:
    from datasets import Dataset


_SOUNDS = (".wav", ".flac", ".mp3", ".ogg")
_SPLITS = {"train": "train", "validation": "validation", "dev": "validation", "val": "validation", "test": "test"}


def read_media(folder: Path) -> Mapping[str, Dataset]:
    """The splits of a folder in a layout that ``datasets`` knows, such as a subfolder of images for each class.

    What ``datasets`` writes on the way goes to a temporary folder, not into the user's cache. Sounds are read here,
    since ``datasets`` needs another package for them.

    Raises:
        DataError: If it knows none.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    if sounds := sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SOUNDS):
        return _sound_splits(folder, sounds)
    with tempfile.TemporaryDirectory() as cache, _without_bars():
        try:
            splits: Mapping[str, Dataset] = load_dataset(str(folder.resolve()), cache_dir=cache, keep_in_memory=True)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"no data files in {str(folder)!r} (found: {listing(folder)}): expected one file per split, such as "
                f"train.tsv, with ending .tsv, .csv, .jsonl, .json or .parquet, in it or in data/, SST-2/ or sst2/; or "
                f"images or sounds, with a subfolder for each class ({type(error).__name__}: {reason})"
            ) from error
    return splits


def _sound_splits(folder: Path, sounds: Sequence[Path]) -> Mapping[str, Dataset]:
    """Sounds by split, in a subfolder for each split and class where there are several: as for images."""
    from datasets import Dataset

    rows: dict[str, dict[str, list[Any]]] = {}
    for path in sounds:
        parts = path.relative_to(folder).parts[:-1]
        split = _SPLITS.get(parts[0]) if parts else None
        columns = rows.setdefault(split or "train", {"audio": [], "label": []})
        columns["audio"].append(_read_sound(path))
        columns["label"].append(parts[-1] if len(parts) > (split is not None) else None)
    for columns in rows.values():
        if None in columns["label"]:
            del columns["label"]
    return {split: Dataset.from_dict(columns) for split, columns in rows.items()}


def _read_sound(path: Path) -> dict[str, Any]:
    """The samples of a sound, -1 to 1, and how many there are a second."""
    content = path.read_bytes()
    try:
        import soundfile  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return _wave(str(path), content)
    samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    return {"array": samples.mean(axis=1).tolist(), "sampling_rate": int(rate)}


def _wave(name: str, content: bytes) -> dict[str, Any]:
    """A WAV file with 16 bits a sample, which needs no other package."""
    import numpy as np

    try:
        with wave.open(io.BytesIO(content)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise DataError(
            f"{name} is not a WAV file ({error}), and soundfile, which reads others, is not installed: pip install "
            f"soundfile, or convert it"
        ) from error
    if width != 2:
        raise DataError(f"{name} has {8 * width} bits a sample: expected 16, or install soundfile, which reads others")
    samples = np.frombuffer(frames, dtype="<i2").reshape(-1, channels).mean(axis=1) / 32768
    return {"array": samples.tolist(), "sampling_rate": rate}


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    import datasets

    shown = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()
