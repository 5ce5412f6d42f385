"""Render a model card, merge it with its author's text, and write it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_prune.checkpoint.files import CARD_DATA
from hf_prune.hub.card_data import PruningCardData, with_reports
from hf_prune.hub.card_metadata import card_metadata
from hf_prune.hub.card_surroundings import BEGIN, END, FACTS, not_plain, parts_of, results_of
from hf_prune.hub.card_text import card_text
from hf_prune.hub.folder_facts import is_rounded
from hf_prune.hub.licenses import LICENSE_FIELDS
from hf_prune.utils.files import write_json, write_text
from hf_prune.utils.folders import refuse_links
from hf_prune.utils.front_matter import join_card, read_card, split_card


def render_card(data: PruningCardData, old: str | None = None) -> str:
    """Render a card, the text of ``README.md``.

    Args:
        data: The facts.
        old: The previous card. The author's text outside of our marks is kept, moved below our part if it could hide
            it, and so is metadata that hf_prune did not write.

    Raises:
        DataError: If the Hub would not accept the metadata.
    """
    text = f"{BEGIN}\n\n{card_text(data)}\n{END}"
    return _merge(card_metadata(data, text), text, old or "")


def merge_cards(mine: str, theirs: str) -> str:
    """Add the author's text and metadata of another card to a rendered one.

    Args:
        mine: The rendered card; returned unchanged if it has no part of ours, or if its author wrote text around it.
        theirs: The card with the author's text.

    Raises:
        DataError: If the metadata of either card is not valid YAML.
    """
    metadata, body = split_card(mine)
    parts = parts_of(body)
    if parts is None or (parts[0] + parts[2]).strip():
        return mine
    return _merge(metadata, parts[1], theirs)


def without_facts(card: str) -> str:
    """Remove our part, the facts and the scores from a card that does not describe its files.

    Raises:
        DataError: If its metadata is not valid YAML.
    """
    metadata, body = split_card(card)
    parts = parts_of(body)
    if parts is not None:
        body = f"{parts[0].rstrip()}\n\n{parts[2].lstrip()}".strip() + "\n"
    return join_card(_authors_metadata(metadata), body)


def _merge(new: dict[str, Any], text: str, old: str) -> str:
    """Replace our part and our metadata in an old card."""
    metadata, body = split_card(old)
    kept = _authors_metadata(metadata, (new.get(FACTS) or {}).get("score"))
    if "license" in kept:  # the author's license wins, with its name and link
        new = {key: value for key, value in new.items() if key not in LICENSE_FIELDS}
        new[FACTS] = {key: value for key, value in new.get(FACTS, {}).items() if key != "license"}
    merged = {**kept, **{key: value for key, value in new.items() if key not in kept or key == FACTS}}
    for key in ("base_model", "datasets", "tags"):
        if key in new:
            merged[key] = _merge_values(kept.get(key), new[key], replace=key != "tags")
    if isinstance(index := kept.get("model-index"), list):
        merged["model-index"] = [*index, *new.get("model-index", [])]
    before, _, after = parts_of(body) or ("", "", "\n\n" + body.strip("\n"))
    if not_plain(before) is not None:  # it could hide our part
        before, after = "", "\n\n" + before.strip("\n") + "\n\n" + after.lstrip("\n")
    after = after.rstrip() + "\n"
    body = f"{before}{text}{after}"
    order = dict.fromkeys([*metadata, *merged])  # the old order, so that a card made again changes only where facts did
    return join_card({key: merged[key] for key in order if key in merged}, body)


def _authors_metadata(metadata: Mapping[str, Any], score: Any = None) -> dict[str, Any]:
    """A card's metadata without the facts, and without the scores and the license that the facts name.

    Args:
        metadata: The metadata.
        score: A new score, whose data has no second result.
    """
    facts = metadata.get(FACTS)
    facts = facts if isinstance(facts, dict) else {}
    kept = {key: value for key, value in metadata.items() if key != FACTS}
    if "license" in facts and facts["license"] == kept.get("license"):
        kept = {key: value for key, value in kept.items() if key not in LICENSE_FIELDS}
    if isinstance(index := kept.get("model-index"), list):
        scores = [s for s in (facts.get("score"), score) if isinstance(s, dict) and "dataset" in s]
        ours = [id(result) for s in scores for result, _ in results_of(index, s)]
        kept["model-index"] = [rest for entry in index if (rest := _without_results(entry, ours))]
        if not kept["model-index"]:
            del kept["model-index"]
    return kept


def _without_results(entry: Any, removed: list[int]) -> Any:
    """An entry of a ``model-index`` without the results with these ids; empty if no result remains."""
    if not isinstance(entry, dict) or not isinstance(entry.get("results"), list):
        return entry
    results = [result for result in entry["results"] if id(result) not in removed]
    return {**entry, "results": results} if results else {}


def _merge_values(old: Any, new: Any, *, replace: bool) -> Any:
    """The author's values if they contain the new ones; else the new values, alone or appended."""
    before, after = ([] if v is None else v if isinstance(v, list) else [v] for v in (old, new))
    if before and set(map(str, after)) <= set(map(str, before)):
        return old
    return new if replace else list(dict.fromkeys([*map(str, before), *after]))


def write_card(folder: str | Path, data: PruningCardData) -> str:
    """Write or update ``README.md`` in a folder, atomically; the text of its author is kept.

    The facts are written beside it, into ``pruning_card.json``.

    Args:
        folder: The folder.
        data: The facts.

    Returns:
        The card.

    Raises:
        DataError: If the metadata of the previous card is not valid YAML, or the Hub would not accept a fact.
    """
    folder = Path(folder)
    data = with_reports(data, folder)
    text = render_facts(folder, data)
    write_json(folder / CARD_DATA, data.to_dict())
    write_text(folder / "README.md", text)
    return text


def render_facts(folder: Path, data: PruningCardData) -> str:
    """Render the card of a folder without writing it; the text of its author is kept."""
    path = folder / "README.md"
    refuse_links(folder, [path.name])
    return render_card(data, read_card(path) if path.is_file() else None)


def as_saved(model: Any, folder: Path) -> Any:
    """The model as its checkpoint holds it: loaded again if values were rounded on saving."""
    return type(model).from_pretrained(folder) if is_rounded(folder) else model
