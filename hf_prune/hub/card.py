"""Model cards that say what was measured, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_prune.checkpoint.files import CARD_DATA
from hf_prune.hub.card_data import PruningCardData, is_rounded, with_reports
from hf_prune.hub.card_metadata import card_metadata
from hf_prune.hub.card_surroundings import BEGIN, END, FACTS, not_plain, parts_of, results_of
from hf_prune.hub.card_text import card_text
from hf_prune.hub.licenses import LICENSE_FIELDS
from hf_prune.utils.files import write_json, write_text
from hf_prune.utils.folders import refuse_links
from hf_prune.utils.front_matter import join_card, read_card, split_card


def render_card(data: PruningCardData, old: str | None = None) -> str:
    """The text of ``README.md``.

    Args:
        data: The facts.
        old: The card so far. What its author wrote outside of our marks stays, below our part if it could hide
            that, and so does metadata that is not ours.

    Raises:
        DataError: If metadata is not as the Hub wants it.
    """
    text = f"{BEGIN}\n\n{card_text(data)}\n{END}"
    return _merge(card_metadata(data, text), text, old or "")


def merge_cards(mine: str, theirs: str) -> str:
    """A card that was rendered elsewhere, with the author's words and metadata of another one.

    Args:
        mine: The card; if it has no part of ours, or words beside it, it is taken as it is.
        theirs: The card with the words.

    Raises:
        DataError: If the metadata of either is no YAML.
    """
    metadata, body = split_card(mine)
    parts = parts_of(body)
    if parts is None or (parts[0] + parts[2]).strip():
        return mine
    return _merge(metadata, parts[1], theirs)


def without_facts(card: str) -> str:
    """A card without our part, the facts and the scores, for files that it does not describe.

    Raises:
        DataError: If its metadata is no YAML.
    """
    metadata, body = split_card(card)
    parts = parts_of(body)
    return join_card(
        _others(metadata), body if parts is None else f"{parts[0].rstrip()}\n\n{parts[2].lstrip()}".strip() + "\n"
    )


def _merge(new: dict[str, Any], text: str, old: str) -> str:
    """A card of new metadata and a new text in our part, the rest as of an old one."""
    metadata, body = split_card(old)
    kept = _others(metadata, (new.get(FACTS) or {}).get("score"))
    if "license" in kept:  # the author's, and whatever belongs to it
        new = {key: value for key, value in new.items() if key not in LICENSE_FIELDS}
        new[FACTS] = {key: value for key, value in new.get(FACTS, {}).items() if key != "license"}
    merged = {**kept, **{key: value for key, value in new.items() if key not in kept or key == FACTS}}
    for key in ("base_model", "datasets", "tags"):
        if key in new:
            merged[key] = _with(kept.get(key), new[key], replace=key != "tags")
    if isinstance(index := kept.get("model-index"), list):
        merged["model-index"] = [*index, *new.get("model-index", [])]
    before, _, after = parts_of(body) or ("", "", "\n\n" + body.strip("\n"))
    if not_plain(before) is not None:  # it could hide our part
        before, after = "", "\n\n" + before.strip("\n") + "\n\n" + after.lstrip("\n")
    after = after.rstrip() + "\n"
    body = f"{before}{text}{after}"
    order = dict.fromkeys([*metadata, *merged])  # as it was: a card that is made again changes where facts do
    return join_card({key: merged[key] for key in order if key in merged}, body)


def _others(metadata: Mapping[str, Any], score: Any = None) -> dict[str, Any]:
    """A card's metadata without what we wrote into it: the facts, and the scores and the license that they name.

    Nor are there results on the data of a new score, of which a model has one.
    """
    facts = metadata.get(FACTS)
    facts = facts if isinstance(facts, dict) else {}
    kept = {key: value for key, value in metadata.items() if key != FACTS}
    if "license" in facts and facts["license"] == kept.get("license"):
        kept = {key: value for key, value in kept.items() if key not in LICENSE_FIELDS}
    if isinstance(index := kept.get("model-index"), list):
        scores = [each for each in (facts.get("score"), score) if isinstance(each, dict) and "dataset" in each]
        ours = [id(result) for each in scores for result, _ in results_of(index, each)]
        kept["model-index"] = [entry for entry in (_less(each, ours) for each in index) if entry]
        if not kept["model-index"]:
            del kept["model-index"]
    return kept


def _less(entry: Any, gone: list[int]) -> Any:
    """An entry of a ``model-index`` without some results; nothing if none is left."""
    if not isinstance(entry, dict) or not isinstance(entry.get("results"), list):
        return entry
    left = [result for result in entry["results"] if id(result) not in gone]
    return {**entry, "results": left} if left else {}


def _with(old: Any, new: Any, *, replace: bool) -> Any:
    """What an author wrote, if that has the new values, or else these in its place or after it."""
    before, after = ([] if each is None else each if isinstance(each, list) else [each] for each in (old, new))
    if before and set(map(str, after)) <= set(map(str, before)):
        return old
    return new if replace else list(dict.fromkeys([*map(str, before), *after]))


def write_card(folder: str | Path, data: PruningCardData) -> str:
    """Write or update ``README.md`` in a folder, at once or not at all; what its author wrote stays.

    The facts go beside it, into ``pruning_card.json``.

    Args:
        folder: The folder.
        data: The facts.

    Returns:
        The card.

    Raises:
        DataError: If the metadata of the card so far, or a fact, is not as the Hub wants it.
    """
    folder = Path(folder)
    data = with_reports(data, folder)
    text = render_facts(folder, data)
    write_json(folder / CARD_DATA, data.to_dict())
    write_text(folder / "README.md", text)
    return text


def render_facts(folder: Path, data: PruningCardData) -> str:
    """The card of a folder with these facts; what its author wrote stays."""
    path = folder / "README.md"
    refuse_links(folder, [path.name])
    return render_card(data, read_card(path) if path.is_file() else None)


def as_saved(model: Any, folder: Path) -> Any:
    """A model as its checkpoint has it: loaded again if values were rounded as they were saved."""
    return type(model).from_pretrained(folder) if is_rounded(folder) else model
