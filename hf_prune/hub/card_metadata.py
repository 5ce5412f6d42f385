"""The YAML metadata of a card: facts for programs, and what the Hub shows."""

from __future__ import annotations

import hashlib
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_prune.errors import DataError
from hf_prune.hub.card_data import PruningCardData
from hf_prune.hub.card_language import language_facts
from hf_prune.hub.card_surroundings import FACTS, parts_of
from hf_prune.hub.card_text import data_name
from hf_prune.hub.card_words import task_of
from hf_prune.hub.client import is_repo_id
from hf_prune.hub.licenses import is_license, is_link
from hf_prune.utils.front_matter import split_card

#: What the facts say of how far predictions moved, which ``verify`` can measure again beside the dense model.
DIVERGENCE = ("kl", "kl_standard_error", "flips", "flips_standard_error", "n")

_SENTENCES = {"SentenceTransformer": "sentence-similarity", "CrossEncoder": "text-ranking"}  # what the Hub calls them


def read_metadata(text: str) -> dict[str, Any]:
    """The metadata of a card; empty if it has none."""
    return split_card(text)[0]


def text_checksum(text: str) -> str | None:
    """SHA-256 of our part of a card in hexadecimal digits; None if it has no such part."""
    ours = our_part(text)
    return None if ours is None else _checksum(ours)


def our_part(text: str) -> str | None:
    """The part of a card between our marks, including the marks; None without marks."""
    parts = parts_of(split_card(text)[1])
    return None if parts is None else parts[1]


def read_facts(text: str) -> dict[str, Any]:
    """The facts in the metadata of a card; empty if it has none."""
    facts = read_metadata(text).get(FACTS)
    return facts if isinstance(facts, dict) else {}


def card_metadata(data: PruningCardData, text: str) -> dict[str, Any]:
    """The metadata of a card.

    Args:
        data: The facts.
        text: Our part of the card, whose checksum becomes a fact.

    Raises:
        DataError: If a license, link or Hub id is not valid.
    """
    for key in ("license", "license_name"):
        value = getattr(data, key)
        if value is not None and not is_license(value):
            raise DataError(f"{key} is {value!r}: expected an identifier such as apache-2.0")
    if data.license_link is not None and not is_link(data.license_link):
        raise DataError(f"license_link is {data.license_link!r}: expected an address, https://…")
    for key in ("base_model", "dataset"):
        if (value := getattr(data, key)) is not None and not is_repo_id(value):
            raise DataError(f"{key} is {value!r}: expected a Hub id, owner/name, since the Hub accepts nothing else")
    results = []
    score = (data.evaluation or {}).get("evaluation")
    if score and data.dataset:
        task, kind = "text-classification", "accuracy"
        if data.tokens:
            task, kind = "text-generation", "perplexity"
        if "metric" in score:
            task, kind = str(score.get("kind", "sentence-similarity")), score["metric"].lower()
        value = score.get("value" if "metric" in score else kind)
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
        language=data.language,
        library_name="sentence-transformers" if data.sentences else "transformers",
        pipeline_tag=_SENTENCES.get(data.sentences) or (task_of(str(data.report["model"])) or (None,))[0],
        tags=["pruned", "sparse", "hf_prune"],
        model_name=data.name if results else None,
        eval_results=results or None,
    )
    return {**card.to_dict(), FACTS: _facts(data, text)}


def _facts(data: PruningCardData, text: str) -> dict[str, Any]:
    """The facts that ``verify`` compares with the files and the text."""
    report = data.report
    if (structure := report.get("structure")) is not None:  # the other numbers are of the model before shrinking
        facts: dict[str, Any] = {"parameters": structure["parameters"]}
    else:
        facts = {key: report[key] for key in ("parameters", "nonzero", "target_parameters", "removed")}
        facts["nm_patterns"] = list(report.get("nm_patterns") or [])
    facts |= {"files": dict(data.files), "sha256": dict(data.checksums), "text": _checksum(text)}
    if data.license:
        facts["license"] = data.license
    if (score := (data.evaluation or {}).get("evaluation")) is not None:
        keys = (
            "accuracy",
            "perplexity",
            "metric",
            "name",
            "kind",
            "value",
            "standard_error",
            "n",
            "n_rows",
            "window",
            "split",
            "data_fingerprint",
        )
        facts["score"] = {key: score[key] for key in keys if score.get(key) is not None}
        if score.get("bos_in_every_window"):
            facts["score"]["bos_in_every_window"] = True
        if (data.evaluation or {}).get("held_out"):
            facts["score"]["held_out"] = dict((data.evaluation or {})["held_out"])
        facts["score"] |= language_facts(data.evaluation or {})
        moved = ((data.evaluation or {}).get("comparison") or {}).get("divergence")
        if moved is not None:
            facts["divergence"] = {key: moved[key] for key in DIVERGENCE}
        if data.dataset:
            facts["score"]["dataset"] = data.dataset
        elif name := data_name(data):
            facts["score"]["data"] = name
    return facts


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
