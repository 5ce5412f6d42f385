"""Whether a checkpoint is what its card says: everything is counted again from the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.hub.card_facts import compare_facts
from hf_prune.hub.card_metadata import read_facts
from hf_prune.hub.client import download_checkpoint
from hf_prune.hub.verification import Difference, Verification
from hf_prune.utils.front_matter import read_card


def verify_checkpoint(
    source: str, *, revision: str | None = None, score: Callable[[str], dict[str, Any]] | None = None
) -> Verification:
    """Count everything again, render the card anew from it, and compare the whole of what hf_prune writes in cards.

    That is what lies between our marks, and the metadata that is ours. What files do not tell (scores unless they are
    measured again, timings, names) is taken from ``pruning_card.json``, and named. A score that is measured again may
    differ by a tenth of its standard error: another machine rounds otherwise.

    Args:
        source: A folder, or a repository on the Hub, which is downloaded.
        revision: Of the repository.
        score: Scores the checkpoint in a folder as ``hf-prune evaluate`` does; None leaves scores unchecked.

    Raises:
        CheckpointError: If the card has no facts, or the files are damaged or do not belong together.
        ConfigError: If a revision of a folder is asked for.
        HubError: If the repository is not there, or the Hub cannot be reached.
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
    said = facts.get("score")
    if score is not None and not isinstance(said, dict):
        raise CheckpointError(f"the card of {source} gives no score to verify: leave --evaluate out")
    model = load_plain(str(folder))
    found, claims = compare_facts(folder, text, model)
    if score is not None and isinstance(said, dict):
        found += _again(said, score(str(folder)))
    return Verification(source, tuple(found), claims)


def _again(said: Mapping[str, Any], found: Mapping[str, Any]) -> list[Difference]:
    error = said.get("standard_error")
    near = error / 10 if isinstance(error, int | float) else 0.0
    tolerances = {"accuracy": near, "perplexity": near, "standard_error": near}
    return [
        Difference(key, value, found.get(key), tolerances.get(key, 0.0))
        for key, value in said.items()
        if key not in ("dataset", "data")
    ]
