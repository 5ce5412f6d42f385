"""Update the card of a checkpoint that was converted, so that it describes the new files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jinja2

from hf_prune.checkpoint.files import CARD_DATA, REPORTS
from hf_prune.errors import DataError, HfPruneError
from hf_prune.hub.card import without_facts, write_card
from hf_prune.hub.card_data import KEPT, PruningCardData, read_card_data, stored_card_data
from hf_prune.hub.card_surroundings import BEGIN, FACTS
from hf_prune.hub.checksums import PICTURES, checksums, weights_digest
from hf_prune.hub.licenses import LICENSE_FIELDS
from hf_prune.hub.measurements import MEASURED
from hf_prune.utils.files import write_text
from hf_prune.utils.front_matter import read_card

_UNUSABLE = (HfPruneError, OSError, jinja2.UndefinedError, AttributeError, KeyError, TypeError, ValueError)


def renew_card(folder: Path, source: Path, name: str, *, lossy: bool = False) -> tuple[str, tuple[str, ...]]:
    """Make the card in a folder describe the converted weights; the text of its author is kept.

    If the values did not change, measurements are kept too. If they were rounded, or the card did not describe the
    files of ``source``, our part is removed, and for rounded values also all reports and pictures.

    Args:
        folder: The new checkpoint, still in the making, with the card and the reports of ``source``.
        source: The folder that was converted.
        name: The name of the new checkpoint.
        lossy: Whether values were rounded.

    Returns:
        A sentence about the card, empty if hf_prune wrote nothing in it; and the files that were removed.
    """
    removed = [file for file in (*REPORTS, *PICTURES, CARD_DATA) if (folder / file).is_file()] if lossy else []
    for file in removed:
        (folder / file).unlink()
    path = folder / "README.md"
    try:
        text = read_card(path, errors="replace") if path.is_file() else ""
        if BEGIN not in text and f"\n{FACTS}:" not in text:
            return "", tuple(removed)
        rest = without_facts(text)
    except DataError as error:
        return f"README.md was not changed, even where it is wrong now: {error}.", tuple(removed)
    old = None if lossy else stored_card_data(source)
    try:
        if old is not None:
            kept = {key: getattr(old, key) for key in (*KEPT, *LICENSE_FIELDS, "report", "versions")}
            title = name if old.name == source.name else old.name
            kept |= _renamed_weights(old, kept, folder)
            data = read_card_data(folder, **kept, name=title)
            write_card(folder, dataclasses.replace(data, rounded=old.rounded or data.rounded))
            return "README.md describes the new files.", tuple(removed)
    except _UNUSABLE:
        pass
    write_text(path, rest)
    (folder / CARD_DATA).unlink(missing_ok=True)
    advice = "hf-prune card FOLDER --write counts again"
    return f"The part of README.md that hf_prune wrote was removed: {advice}.", tuple(removed)


def _renamed_weights(old: PruningCardData, kept: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The measurements, with the digest of the new files, which hold the same values, in place of the old one."""
    before, now = weights_digest(old.checksums), weights_digest(checksums(folder))
    renamed = {}
    for key in MEASURED:
        weights = (kept[key] or {}).get("weights")
        if isinstance(weights, dict):
            digests = {name: now if digest == before else digest for name, digest in weights.items()}
            renamed[key] = {**kept[key], "weights": digests}
        elif weights == before is not None:
            renamed[key] = {**kept[key], "weights": now}
    return renamed
