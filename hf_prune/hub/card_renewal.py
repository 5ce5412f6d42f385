"""The card of a checkpoint that is written in another form: it describes the new files, or nothing."""

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
from hf_prune.utils.files import write_text
from hf_prune.utils.front_matter import read_card

_UNKNOWN = (HfPruneError, OSError, jinja2.UndefinedError, AttributeError, KeyError, TypeError, ValueError)


def renew_card(folder: Path, source: Path, name: str, *, lossy: bool = False) -> tuple[str, tuple[str, ...]]:
    """Have the card in a folder describe the weights that are there now; what its author wrote stays.

    If the values are the same, what was measured stays as well. If they were rounded, or the card did not describe its
    own files, what hf_prune wrote goes, and of rounded values all that was counted and drawn.

    Args:
        folder: A checkpoint that is being made, with the card and the reports of ``source``.
        source: The folder that it is made of.
        name: What the new one will be called.
        lossy: Whether values were rounded.

    Returns:
        What became of the card, empty if there was nothing of ours in it; and the files that were taken out.
    """
    gone = [each for each in (*REPORTS, *PICTURES, CARD_DATA) if (folder / each).is_file()] if lossy else []
    for each in gone:
        (folder / each).unlink()
    path = folder / "README.md"
    try:
        text = read_card(path, errors="replace") if path.is_file() else ""
        if BEGIN not in text and f"\n{FACTS}:" not in text:
            return "", tuple(gone)
        left = without_facts(text)
    except DataError as error:
        return f"README.md is as it was, also where it is wrong now: {error}.", tuple(gone)
    old = None if lossy else stored_card_data(source)
    try:
        if old is not None:
            kept = {key: getattr(old, key) for key in (*KEPT, *LICENSE_FIELDS, "report", "versions")}
            title = name if old.name == source.name else old.name
            kept |= _of_the_same_values(old, kept, folder)
            data = read_card_data(folder, **kept, name=title)
            write_card(folder, dataclasses.replace(data, rounded=old.rounded or data.rounded))
            return "README.md describes the new files.", tuple(gone)
    except _UNKNOWN:
        pass
    write_text(path, left)
    (folder / CARD_DATA).unlink(missing_ok=True)
    return "What hf_prune wrote in README.md is gone: hf-prune card FOLDER --write counts anew.", tuple(gone)


def _of_the_same_values(old: PruningCardData, kept: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What was measured, said of the files that hold the same values now."""
    before, now = weights_digest(old.checksums), weights_digest(checksums(folder))
    found = {}
    for key in ("evaluation", "latency"):
        said = (kept[key] or {}).get("weights")
        if isinstance(said, dict):
            found[key] = {**kept[key], "weights": {n: now if each == before else each for n, each in said.items()}}
        elif said == before is not None:
            found[key] = {**kept[key], "weights": now}
    return found
