"""SHA-256 of the files that a card describes."""

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
BESIDE = (*REPORTS, *PICTURES)  # drawn and counted; a checkpoint is the same without them
_WEIGHTS = re.compile(r"[^/]+\.safetensors")


def differing(said: Mapping[str, Any], found: Mapping[str, str]) -> list[str]:
    """Names of the files that a card describes, and that are others now.

    A card that was made before there was a tokenizer, or a report or picture that it does not name, describes none.

    Args:
        said: SHA-256 by name, of the card.
        found: The same of the files.
    """
    free = {*BESIDE, *(() if set(said) & set(COMPANIONS) else COMPANIONS)}
    return sorted(name for name in {*said, *(set(found) - free)} if said.get(name) != found.get(name))


def checksums(folder: Path, patterns: Sequence[str] = (*_DESCRIBED, *BESIDE)) -> dict[str, str]:
    """SHA-256 of a checkpoint's weights, masks, config, index, code, tokenizer, reports and pictures, by name."""
    found = {}
    for path in sorted({p for pattern in patterns for p in folder.glob(pattern)}):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(CHUNK_BYTES):
                digest.update(part)
        found[path.name] = digest.hexdigest()
    return found


def weights_digest(sums: Mapping[str, str]) -> str | None:
    """One SHA-256 for all files of weights, as ``sha256sum *.safetensors | sha256sum`` gives it without the masks.

    Args:
        sums: SHA-256 by name; None is returned if there are no weights among them.
    """
    lines = [f"{sums[name]}  {name}\n" for name in sorted(sums) if _WEIGHTS.fullmatch(name) and name != MASK_FILE]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def measured_weights(source: str) -> str | None:
    """The :func:`weights_digest` of a folder, or of what was downloaded of a repository.

    Args:
        source: Folder or Hub id; None is returned where there are no safetensors.
    """
    folder = Path(source)
    if not folder.is_dir():
        path = try_to_load_from_cache(source, "config.json") if is_repo_id(source) else None
        if not isinstance(path, str):
            return None
        folder = Path(path).parent
    return weights_digest(checksums(folder, ("*.safetensors",)))
