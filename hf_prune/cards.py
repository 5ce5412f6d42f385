"""Model cards that say what was measured, and nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_prune.card_data import (
    LICENSE_FIELDS,
    PICTURES,
    PruningCardData,
    is_license,
    is_link,
    is_rounded,
    read_card_data,
    with_reports,
)
from hf_prune.card_surroundings import (
    BEGIN,
    END,
    FACTS,
    not_plain,
    parts_of,
    results_of,
)
from hf_prune.card_text import card_text, data_name
from hf_prune.checkpoint import CARD_DATA
from hf_prune.errors import DataError
from hf_prune.files import refuse_links, write_json, write_text
from hf_prune.front_matter import join_card, read_card, split_card
from hf_prune.hub import is_repo_id
from hf_prune.masking import MaskStore
from hf_prune.plots import write_plots
from hf_prune.report import SparsityReport, sparsity_report, weight_histogram
from hf_prune.shrinking import RECORD
from hf_prune.structures import structure_report


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
    return _merge(_metadata(data, text), text, old or "")


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
    text = _rendered(folder, data)
    write_json(folder / CARD_DATA, data.to_dict())
    write_text(folder / "README.md", text)
    return text


def _rendered(folder: Path, data: PruningCardData) -> str:
    path = folder / "README.md"
    refuse_links(folder, [path.name])
    return render_card(data, read_card(path) if path.is_file() else None)


def full_report(model: Any) -> SparsityReport:
    """What is zero in a model, and what was taken out of it."""
    report = sparsity_report(model)
    if getattr(getattr(model, "config", None), RECORD, None) is not None:
        report = dataclasses.replace(report, structure=structure_report(model))
    return report


def as_saved(model: Any, folder: Path) -> Any:
    """A model as its checkpoint has it: loaded again if values were rounded as they were saved."""
    return type(model).from_pretrained(folder) if is_rounded(folder) else model


def describe_model(model: Any, folder: str | Path, *, plots: bool = True, **more: Any) -> str:
    """Count what is zero in a model, and write the report and the card into the folder that it was saved in.

    Values that were rounded as they were saved are loaded again, and counted as they are now.

    Args:
        model: The model.
        folder: Its checkpoint.
        plots: Also draw the card's pictures, in place of those that are there; of masks only.
        **more: As of :func:`read_card_data`.

    Returns:
        The card.

    Raises:
        DataError: If the card so far is no YAML, or a fact is not as the Hub wants it; the folder is as it was.
    """
    folder = Path(folder)
    model = as_saved(model, folder)
    report, store = full_report(model), MaskStore.of(model)
    draws = plots and store is not None and report.structure is None
    if plots:
        more["pictures"] = PICTURES if draws else {}
    data = read_card_data(folder, **{**more, "report": report.to_dict()})
    _rendered(folder, data)  # errors come before anything is written
    for name in PICTURES if plots else ():
        (folder / name).unlink(missing_ok=True)
    if draws and store is not None:
        write_plots(folder, report, None, weight_histogram(model, list(store.masks)), report.model_name)
    write_json(folder / "sparsity_report.json", report.to_dict())
    return write_card(folder, data)


def read_metadata(text: str) -> dict[str, Any]:
    """The metadata of a card, empty if it has none."""
    return split_card(text)[0]


def text_checksum(text: str) -> str | None:
    """SHA-256 of our part of a card, in hexadecimal digits; None if it has none."""
    ours = our_part(text)
    return None if ours is None else _checksum(ours)


def our_part(text: str) -> str | None:
    """What is between our marks in a card, the marks included; None if they are not there."""
    parts = parts_of(split_card(text)[1])
    return None if parts is None else parts[1]


def read_facts(text: str) -> dict[str, Any]:
    """The numbers that a card gives to programs, empty if it has none."""
    facts = read_metadata(text).get(FACTS)
    return facts if isinstance(facts, dict) else {}


# --- metadata ------------------------------------------------------------------------------------------------


def _metadata(data: PruningCardData, text: str) -> dict[str, Any]:
    for key in ("license", "license_name"):
        value = getattr(data, key)
        if value is not None and not is_license(value):
            raise DataError(f"{key} is {value!r}: expected an identifier such as apache-2.0")
    if data.license_link is not None and not is_link(data.license_link):
        raise DataError(f"license_link is {data.license_link!r}: expected an address, https://…")
    for key in ("base_model", "dataset"):
        if (value := getattr(data, key)) is not None and not is_repo_id(value):
            raise DataError(f"{key} is {value!r}: expected a Hub id, owner/name; the Hub takes no other")
    results = []
    score = (data.evaluation or {}).get("evaluation")
    if score and data.dataset:
        kind, value = ("perplexity", score.get("perplexity")) if data.tokens else ("accuracy", score.get("accuracy"))
        task = "text-generation" if data.tokens else "text-classification"
        results = [
            EvalResult(
                task_type=task,
                dataset_type=data.dataset,
                dataset_name=data.dataset,
                dataset_split=score.get("split") or None,
                metric_type=kind,
                metric_value=value,
            )
        ]
    card = ModelCardData(
        base_model=data.base_model,
        license=data.license,
        license_name=data.license_name,
        license_link=data.license_link,
        datasets=[data.dataset] if data.dataset else None,
        library_name="transformers",
        tags=["pruned", "sparse", "hf_prune"],
        model_name=data.name if results else None,
        eval_results=results or None,
    )
    return {**card.to_dict(), FACTS: _facts(data, text)}


def _facts(data: PruningCardData, text: str) -> dict[str, Any]:
    """What verify compares with the files, and with the text."""
    report = data.report
    if (structure := report.get("structure")) is not None:  # the rest of the report counts what was taken out since
        facts: dict[str, Any] = {"parameters": structure["parameters"]}
    else:
        facts = {key: report[key] for key in ("parameters", "nonzero", "target_parameters", "removed")}
        facts["nm_patterns"] = list(report.get("nm_patterns") or [])
    facts |= {"files": dict(data.files), "sha256": dict(data.checksums), "text": _checksum(text)}
    if data.license:
        facts["license"] = data.license
    if (score := (data.evaluation or {}).get("evaluation")) is not None:
        keys = ("accuracy", "perplexity", "standard_error", "n", "window", "split", "data_fingerprint")
        facts["score"] = {key: score[key] for key in keys if score.get(key) is not None}
        if data.dataset:
            facts["score"]["dataset"] = data.dataset
        elif name := data_name(data):
            facts["score"]["data"] = name
    return facts


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
