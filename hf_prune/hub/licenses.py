"""The license of a base model, which applies to models derived from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hf_prune.errors import DataError
from hf_prune.hub.client import card_of_base
from hf_prune.utils.front_matter import read_card, split_card

_LICENSE = re.compile(r"[\w.-]+")
_LINK = re.compile(r"https?://[^\s<>\"'`]+")
LICENSE_FIELDS = ("license", "license_name", "license_link")


def inherited_license(base_model: str) -> dict[str, str]:
    """Read the license in the card of a base model.

    Args:
        base_model: Folder or Hub id; the Hub is asked once.

    Returns:
        The fields ``license``, ``license_name`` and ``license_link`` of :class:`PruningCardData`; empty if the card
        names no license or cannot be read.
    """
    folder = Path(base_model)
    try:
        if folder.is_dir():
            card = folder / "README.md"
            text = read_card(card, errors="replace") if card.is_file() else None
        else:
            text = card_of_base(base_model)
        metadata = split_card(text or "")[0]
    except DataError:
        return {}
    if not is_license(metadata.get("license")):
        return {}
    fields = {"license": metadata["license"]}
    if metadata["license"] == "other":
        if is_license(name := metadata.get("license_name")):
            fields["license_name"] = name
        if isinstance(link := metadata.get("license_link"), str):
            if not folder.is_dir() and re.fullmatch(r"[\w.-]+", link):
                link = f"https://huggingface.co/{base_model}/blob/main/{link}"
            if is_link(link):
                fields["license_link"] = link
    return fields


def is_license(value: Any) -> bool:
    """Whether a value has the form of a license identifier."""
    return isinstance(value, str) and _LICENSE.fullmatch(value) is not None


def is_link(value: str) -> bool:
    """Whether a text is a web address without characters that break out of a card's markup."""
    return _LINK.fullmatch(value) is not None
