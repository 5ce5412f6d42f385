"""Refuse to push a card that is not right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError
from hf_prune.hub.card import as_saved, render_card
from hf_prune.hub.card_data import PruningCardData
from hf_prune.hub.card_metadata import our_part, read_facts
from hf_prune.hub.card_surroundings import surroundings
from hf_prune.hub.checksums import checksums, differing
from hf_prune.hub.compare_card import compare_facts, compare_text
from hf_prune.hub.verification import Difference, show_value
from hf_prune.utils.formatting import first_few
from hf_prune.utils.front_matter import read_card


def check_card(folder: Path, model: Any = None) -> None:
    """Check the card in a folder like :func:`verify_checkpoint`, if hf_prune wrote a part of it.

    Args:
        folder: A checkpoint.
        model: The model saved in it, if it is in memory; None loads it.

    Raises:
        CheckpointError: If the card is not right, or the files are damaged.
        DataError: If its metadata is not valid YAML.
    """
    from hf_prune.checkpoint.native import load_plain

    path = folder / "README.md"
    text = read_card(path) if path.is_file() else ""
    if not read_facts(text) and our_part(text) is None:
        return
    new = "with new --evaluation, --latency or --acceleration where those are wrong"
    advice = f"edit it, or run hf-prune card {folder} --write, {new}"
    claimed = read_facts(text).get("sha256")
    # First, since files other than those of the card may not even load.
    if changed := differing(claimed if isinstance(claimed, dict) else {}, checksums(folder)):
        raise CheckpointError(f"{path} describes other files than those beside it ({first_few(changed)}): {advice}")
    model = load_plain(str(folder)) if model is None else as_saved(model, folder)
    _refuse(compare_facts(folder, text, model)[0], f"{path} is not right", f"see hf-prune verify {folder}; {advice}")


def check_text(text: str, data: PruningCardData, what: str, advice: str) -> None:
    """Check that a card says what its facts say, and that nothing around our part hides or contradicts it.

    Args:
        text: The card.
        data: The facts.
        what: The beginning of the message, such as ``"the card of FOLDER is not right"``.
        advice: The end of the message: what to do.

    Raises:
        CheckpointError: If it does not.
    """
    around = [Difference(*fact) for fact in surroundings(text)]
    _refuse([*compare_text(render_card(data, text), text, read_facts(text)), *around], what, advice)


def _refuse(facts: Sequence[Difference], what: str, advice: str) -> None:
    wrong = [
        f"{fact.name}: {show_value(fact.claimed)}, expected {show_value(fact.counted)}"
        for fact in facts
        if not fact.is_same
    ]
    if wrong:
        raise CheckpointError(f"{what}: {'; '.join(wrong[:3])}: {advice}")
