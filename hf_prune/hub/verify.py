"""Verify a model card: count every number again from the files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.hub.card_metadata import read_facts
from hf_prune.hub.client import download_checkpoint
from hf_prune.hub.compare_card import DIVERGENCE, SCORES, compare_facts
from hf_prune.hub.verification import Difference, Verification
from hf_prune.utils.front_matter import read_card
from hf_prune.utils.progress import working


@working("Counting again")
def verify_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    score: Callable[[str], dict[str, Any]] | None = None,
    divergence: Callable[[str], dict[str, Any] | None] | None = None,
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
        divergence: Measures how far the predictions of the checkpoint in a folder are from the dense model's, after
            ``score``; None leaves that unchecked.

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
    claimed_divergence = facts.get("divergence")
    if divergence is not None and not isinstance(claimed_divergence, dict):
        raise CheckpointError(
            f"the card of {source} does not say how far its predictions are from the dense model's: leave --against out"
        )
    model = load_plain(str(folder))
    differences, claims = compare_facts(folder, text, model)
    if score is not None and isinstance(claimed_score, dict):
        differences += _compare_scores(claimed_score, score(str(folder)))
    if divergence is not None and isinstance(claimed_divergence, dict):
        differences += _compare_divergences(claimed_divergence, divergence(str(folder)) or {})
    measured = {name for name, again in ((SCORES, score), (DIVERGENCE, divergence)) if again is not None}
    return Verification(source, tuple(differences), tuple(name for name in claims if name not in measured))


def _compare_scores(claimed: Mapping[str, Any], measured: Mapping[str, Any]) -> Iterator[Difference]:
    """Every number of a score that was measured again; what is compared with another model was not."""
    error = claimed.get("standard_error")
    near = error / 10 if isinstance(error, int | float) else 0.0
    tolerances = dict.fromkeys(("accuracy", "perplexity", "value", "distinct", "standard_error"), near)
    for key, value in claimed.items():
        if isinstance(value, dict) and isinstance(measured.get(key), dict):  # what the model writes
            again = {name: item for name, item in value.items() if name in measured[key]}
            for fact in _compare_scores(again, measured[key]):
                yield dataclasses.replace(fact, name=f"{key}: {fact.name}")
        elif not isinstance(value, dict) and key not in ("dataset", "data"):
            yield Difference(key, value, measured.get(key), tolerances.get(key, 0.0))


def _compare_divergences(claimed: Mapping[str, Any], measured: Mapping[str, Any]) -> Iterator[Difference]:
    """Numbers may differ by a tenth of the standard error that the card claims."""
    for key, value in claimed.items():
        error = claimed.get(f"{key.removesuffix('_standard_error')}_standard_error")
        near = error / 10 if isinstance(error, int | float) else 0.0
        yield Difference(f"{key} of the divergence", value, measured.get(key), near)
