"""Refuse to push a card that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError
from hf_prune.hub.card import as_saved, render_card
from hf_prune.hub.card_data import (
    PruningCardData,
)
from hf_prune.hub.card_facts import compare_facts, compare_text
from hf_prune.hub.card_metadata import our_part, read_facts
from hf_prune.hub.card_surroundings import surroundings
from hf_prune.hub.checksums import checksums, differing
from hf_prune.hub.verification import Difference, show_value
from hf_prune.utils.formatting import first_few
from hf_prune.utils.front_matter import read_card


def check_card(folder: Path, model: Any = None) -> None:
    """See that a folder's card, if it has one of ours, is right: as :func:`verify_checkpoint` does.

    Args:
        folder: A checkpoint.
        model: The model that is saved in it, if it is at hand; None loads it.

    Raises:
        CheckpointError: If it is not, or the files are damaged.
        DataError: If its metadata is no YAML.
    """
    from hf_prune.checkpoint.native import load_plain

    path = folder / "README.md"
    text = read_card(path) if path.is_file() else ""
    if not read_facts(text) and our_part(text) is None:
        return
    advice = (
        f"edit it, or run hf-prune card {folder} --write, with --evaluation or --latency anew where those are wrong"
    )
    said = read_facts(text).get("sha256")
    if others := differing(said if isinstance(said, dict) else {}, checksums(folder)):  # which may not even load
        raise CheckpointError(f"{path} describes other files than those beside it ({first_few(others)}): {advice}")
    model = load_plain(str(folder)) if model is None else as_saved(model, folder)
    _refuse(compare_facts(folder, text, model)[0], f"{path} is not right", f"see hf-prune verify {folder}; {advice}")


def check_text(text: str, data: PruningCardData, what: str, advice: str) -> None:
    """See that a card says what it is rendered from, and that nothing around it hides or contradicts that.

    Args:
        text: The card.
        data: What it is rendered from.
        what: What is wrong if it does not, for the message.
        advice: What to do then.

    Raises:
        CheckpointError: If it does not.
    """
    around = [Difference(*each) for each in surroundings(text)]
    _refuse([*compare_text(render_card(data, text), text, read_facts(text)), *around], what, advice)


def _refuse(facts: Sequence[Difference], what: str, advice: str) -> None:
    wrong = [
        f"{fact.name}: {show_value(fact.said)}, expected {show_value(fact.found)}" for fact in facts if not fact.is_same
    ]
    if wrong:
        raise CheckpointError(f"{what}: {'; '.join(wrong[:3])}: {advice}")
