"""Verify a model card: count every number again from the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.hub.card_metadata import read_facts
from hf_prune.hub.client import download_checkpoint
from hf_prune.hub.compare_card import compare_facts
from hf_prune.hub.verification import Difference, Verification
from hf_prune.utils.front_matter import read_card


def verify_checkpoint(
    source: str, *, revision: str | None = None, score: Callable[[str], dict[str, Any]] | None = None
) -> Verification:
    """Verify a model card: count every number again from the files, render the card again, and compare.

    Everything that hf_prune wrote is compared: the text between its marks, and its metadata. What files do not show
    (timings, names, and scores unless they are measured again) is taken from ``pruning_card.json`` and listed as
    claimed. A score that is measured again may differ by a tenth of its standard error, since machines round
    differently.

    Args:
        source: A folder, or a repository on the Hub, which is downloaded.
        revision: Revision of the repository.
        score: Scores the checkpoint in a folder like ``hf-prune evaluate``; None leaves scores unchecked.

    Raises:
        CheckpointError: If the card has no facts, or the files are damaged or do not belong together.
        ConfigError: If a revision is given for a folder.
        HubError: If the repository does not exist, or the Hub cannot be reached.
    """
    from hf_prune.checkpoint.native import load_plain

    if revision is not None and Path(source).is_dir():
        raise ConfigError(f"{source} is a folder and has no revisions: leave --revision out")
    folder = Path(source) if Path(source).is_dir() else download_checkpoint(source, revision)
    card = folder / "README.md"
    text = read_card(card) if card.is_file() else ""
    facts = read_facts(text)
    if not facts:
        raise CheckpointError(
            f"{source} has no card with facts to verify: expected README.md with metadata under 'hf_prune'; write it "
            f"with hf-prune card"
        )
    claimed_score = facts.get("score")
    if score is not None and not isinstance(claimed_score, dict):
        raise CheckpointError(f"the card of {source} gives no score to verify: leave --evaluate out")
    model = load_plain(str(folder))
    differences, claims = compare_facts(folder, text, model)
    if score is not None and isinstance(claimed_score, dict):
        differences += _compare_scores(claimed_score, score(str(folder)))
    return Verification(source, tuple(differences), claims)


def _compare_scores(claimed: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Difference]:
    error = claimed.get("standard_error")
    near = error / 10 if isinstance(error, int | float) else 0.0
    tolerances = {"accuracy": near, "perplexity": near, "standard_error": near}
    return [
        Difference(key, value, measured.get(key), tolerances.get(key, 0.0))
        for key, value in claimed.items()
        if key not in ("dataset", "data")
    ]
