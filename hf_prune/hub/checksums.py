"""Checksums of the files that a card describes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from hf_prune.checkpoint.companions import COMPANIONS
from hf_prune.checkpoint.files import MASK_FILE, REPORTS
from hf_prune.checkpoint.shards import CHUNK_BYTES
from hf_prune.hub.client import is_repo_id

PICTURES = {"layers.png": "Sparsity by layer", "weights.png": "Histogram of the weights"}
_DESCRIBED = ("*.safetensors", "*.safetensors.index.json", "config.json", "*.py", *COMPANIONS)
BESIDE = (*REPORTS, *PICTURES)  # made from the checkpoint, which is the same without them
_WEIGHTS = re.compile(r"[^/]+\.safetensors")


def differing(claimed: Mapping[str, Any], counted: Mapping[str, str]) -> list[str]:
    """Names of the files whose checksums differ from those in a card.

    Reports and pictures that the card does not name are ignored, and so are tokenizers if it names none.

    Args:
        claimed: SHA-256 by file name, in the card.
        counted: SHA-256 by file name, of the files.
    """
    optional = {*BESIDE, *(() if set(claimed) & set(COMPANIONS) else COMPANIONS)}
    return sorted(name for name in {*claimed, *(set(counted) - optional)} if claimed.get(name) != counted.get(name))


def checksums(folder: Path, patterns: Sequence[str] = (*_DESCRIBED, *BESIDE)) -> dict[str, str]:
    """SHA-256 of a checkpoint's weights, masks, config, index, code, tokenizer, reports and pictures, by name."""
    sums = {}
    for path in sorted({p for pattern in patterns for p in folder.glob(pattern)}):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(CHUNK_BYTES):
                digest.update(part)
        sums[path.name] = digest.hexdigest()
    return sums


def weights_digest(sums: Mapping[str, str]) -> str | None:
    """One SHA-256 for all weight files, equal to ``sha256sum *.safetensors | sha256sum`` without the masks.

    Args:
        sums: SHA-256 by file name.

    Returns:
        The digest; None if there are no weight files.
    """
    lines = [f"{sums[name]}  {name}\n" for name in sorted(sums) if _WEIGHTS.fullmatch(name) and name != MASK_FILE]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def measured_weights(source: str) -> str | None:
    """The :func:`weights_digest` of a folder, or of a repository in the local cache.

    Args:
        source: Folder or Hub id.

    Returns:
        The digest; None if there are no safetensors files.
    """
    folder = Path(source)
    if not folder.is_dir():
        path = try_to_load_from_cache(source, "config.json") if is_repo_id(source) else None
        if not isinstance(path, str):
            return None
        folder = Path(path).parent
    return weights_digest(checksums(folder, ("*.safetensors",)))
