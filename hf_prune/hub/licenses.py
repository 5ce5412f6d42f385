"""Licenses, and those that a base model passes on."""

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
    """What the card of a base model says of its license, which applies to every model that is made of it.

    Args:
        base_model: A folder, or a Hub id. The Hub is asked once; a folder wins.

    Returns:
        The fields ``license``, ``license_name`` and ``license_link`` of :class:`PruningCardData`; empty if the card
        names no license, or cannot be read.
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
    found = {"license": metadata["license"]}
    if metadata["license"] == "other":
        if is_license(name := metadata.get("license_name")):
            found["license_name"] = name
        if isinstance(link := metadata.get("license_link"), str):
            if not folder.is_dir() and re.fullmatch(r"[\w.-]+", link):
                link = f"https://huggingface.co/{base_model}/blob/main/{link}"
            if is_link(link):
                found["license_link"] = link
    return found


def is_license(value: Any) -> bool:
    """Whether it can be the identifier of a license."""
    return isinstance(value, str) and _LICENSE.fullmatch(value) is not None


def is_link(value: str) -> bool:
    """Whether it is an address that a card may lead to."""
    return _LINK.fullmatch(value) is not None
