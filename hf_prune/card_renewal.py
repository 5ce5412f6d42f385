"""The card of a checkpoint that is written in another form: it describes the new files, or nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jinja2

from hf_prune.card_data import PICTURES, PruningCardData, checksums, read_card_data
from hf_prune.cards import BEGIN, FACTS, read_facts, without_facts, write_card
from hf_prune.checkpoint import CARD_DATA, REPORTS
from hf_prune.errors import DataError, HfPruneError
from hf_prune.files import write_json, write_text
from hf_prune.recount import recounted

_ALWAYS = ("base_model", "dataset", "license", "license_name", "license_link", "command")
_MEASURED = ("evaluation", "latency")
_UNKNOWN = (HfPruneError, OSError, jinja2.UndefinedError, AttributeError, KeyError, TypeError, ValueError)


def renew_card(folder: Path, source: Path, name: str, *, lossy: bool = False) -> tuple[str, tuple[str, ...]]:
    """Have the card in a folder describe the weights that are there now; what its author wrote stays.

    If the values are the same, what was measured stays as well. After rounding it is gone, and what can be counted is
    counted again. A card that did not describe its own files, or cannot be made anew, loses what hf_prune wrote.

    Args:
        folder: A checkpoint that is being made, with the card and the reports of ``source``.
        source: The folder that it is made of.
        name: What the new one will be called.
        lossy: Whether values were rounded.

    Returns:
        What became of the card, empty if there was nothing of ours in it; and the files that were taken out.
    """
    gone = _without_old_values(folder) if lossy else ()
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if BEGIN not in text and f"\n{FACTS}:" not in text:
        return "", gone
    try:
        read_facts(text)
    except DataError:
        return "README.md is as it was, also where it is wrong now: its metadata is no YAML.", gone
    try:
        values = json.loads((folder / CARD_DATA).read_text(encoding="utf-8"))
        old = PruningCardData.from_dict(values)
        if dict(old.checksums) != checksums(source):
            raise DataError(f"the card of {source} describes other files")
        kept = {key: getattr(old, key) for key in (*_ALWAYS, *(() if lossy else _MEASURED))}
        title = name if old.name == source.name else old.name
        write_card(folder, dataclasses.replace(read_card_data(folder), name=title, **kept))
    except _UNKNOWN:
        write_text(path, without_facts(text))
        (folder / CARD_DATA).unlink(missing_ok=True)
        return (
            "What hf_prune wrote in README.md is gone: nothing here tells it anew; save the model again, or see "
            "hf-prune card."
        ), gone
    if lossy:
        return "README.md describes the new files; what was measured before the rounding is gone from it.", gone
    return "README.md describes the new files.", gone


def _without_old_values(folder: Path) -> tuple[str, ...]:
    """Take out what rounding made wrong, and count again what can be counted."""
    counted, training = (folder / name for name in REPORTS)
    try:
        report = json.loads((training if training.is_file() else counted).read_text(encoding="utf-8"))
        new = recounted(report["sparsity"] if training.is_file() else report, folder)
    except _UNKNOWN:
        new = None
    gone = [training.name, *PICTURES, *([] if new else [counted.name])]
    gone = [name for name in gone if (folder / name).is_file()]
    for name in gone:
        (folder / name).unlink()
    if new:
        write_json(counted, new)
    return tuple(gone)
