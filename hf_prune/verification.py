"""Whether a checkpoint is what its card says: everything is counted again from the files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_prune.card_data import checksums
from hf_prune.card_text import counted_lines
from hf_prune.cards import full_report, read_facts, read_metadata, results_of, text_checksum
from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.files import read_text
from hf_prune.hub import download_checkpoint
from hf_prune.tables import format_table

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Difference:
    """One fact of a card.

    Args:
        name: Which one.
        said: What the card says.
        found: What was counted.
        tolerance: How far apart numbers may be.
    """

    name: str
    said: Any
    found: Any
    tolerance: float = 0.0

    @property
    def is_same(self) -> bool:
        """Whether the card is right."""
        if self.tolerance and isinstance(self.said, int | float) and isinstance(self.found, int | float):
            return abs(self.said - self.found) <= self.tolerance
        return bool(self.said == self.found)


@dataclass(frozen=True)
class Verification:
    """A card beside what was counted. ``print(verification)`` shows it as a table.

    Args:
        source: The folder or repository.
        facts: All facts of the card.
    """

    source: str
    facts: tuple[Difference, ...]

    @property
    def is_right(self) -> bool:
        """Whether every fact is."""
        return all(fact.is_same for fact in self.facts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"source": self.source, "is_right": self.is_right, "facts": [vars(fact) for fact in self.facts]}

    def __str__(self) -> str:
        rows = [
            [fact.name, _show(fact.said), _show(fact.found), "" if fact.is_same else "DIFFERENT"] for fact in self.facts
        ]
        wrong = sum(not fact.is_same for fact in self.facts)
        end = "The card is right." if not wrong else f"{wrong} of {len(self.facts)} facts of the card are wrong."
        return f"{format_table(['fact', 'card', 'counted', ''], rows, left=1)}\n{end}"


def _show(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value[:16]}…" if isinstance(value, str) and _SHA256.fullmatch(value) else str(value)


def verify_checkpoint(
    source: str, *, revision: str | None = None, score: Callable[[str], dict[str, Any]] | None = None
) -> Verification:
    """Count everything again that a card gives to programs, and compare its text with it.

    A score that is measured again may differ by a tenth of its standard error: another machine rounds otherwise.

    Args:
        source: A folder, or a repository on the Hub, which is downloaded.
        revision: Of the repository.
        score: Scores the checkpoint in a folder as ``hf-prune evaluate`` does; None leaves scores unchecked.

    Raises:
        CheckpointError: If the card has no facts, or the files are damaged or do not belong together.
        ConfigError: If a revision of a folder is asked for.
        HubError: If the repository is not there, or the Hub cannot be reached.
    """
    from hf_prune.auto import load_native

    if revision is not None and Path(source).is_dir():
        raise ConfigError(f"{source} is a folder and has no revisions: leave --revision out")
    folder = Path(source) if Path(source).is_dir() else download_checkpoint(source, revision)
    card = folder / "README.md"
    text = read_text(card) if card.is_file() else ""
    facts = read_facts(text)
    if not facts:
        raise CheckpointError(
            f"{source} has no card with facts to verify: expected README.md with metadata under 'hf_prune'; write it "
            f"with hf-prune card"
        )
    said = facts.get("score")
    if score is not None and not isinstance(said, dict):
        raise CheckpointError(f"the card of {source} gives no score to verify: leave --evaluate out")
    report = full_report(load_native(str(folder))).to_dict()
    shrunk = report["structure"] is not None
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    counted = {**report, "parameters": report["structure"]["parameters"]} if shrunk else report
    found = [Difference(key, facts.get(key), counted[key]) for key in _COUNTED[: 1 if shrunk else None]]
    found += _by_name("bytes of", facts.get("files"), sizes)
    found += _by_name("SHA-256 of", facts.get("sha256"), checksums(folder))
    found.append(Difference("SHA-256 of the text", facts.get("text"), text_checksum(text)))
    found += _shown(text, report, sizes, said)
    if score is not None and said is not None:
        found += _again(said, score(str(folder)))
    return Verification(source, tuple(found))


_COUNTED = ("parameters", "nonzero", "target_parameters", "removed", "nm_patterns")


def _by_name(what: str, said: Any, found: Mapping[str, Any]) -> list[Difference]:
    said = said if isinstance(said, dict) else {}
    return [Difference(f"{what} {name}", said.get(name), found.get(name)) for name in sorted({*said, *found}, key=str)]


def _again(said: Mapping[str, Any], found: Mapping[str, Any]) -> list[Difference]:
    error = said.get("standard_error")
    near = error / 10 if isinstance(error, int | float) else 0.0
    tolerances = {"accuracy": near, "perplexity": near, "standard_error": near}
    return [
        Difference(key, value, found.get(key), tolerances.get(key, 0.0))
        for key, value in said.items()
        if key != "dataset"
    ]


def _shown(text: str, report: Mapping[str, Any], files: Mapping[str, int], score: Any) -> list[Difference]:
    """What a card's text and its ``model-index`` show that is not what was counted, or what the facts say."""
    there = set(text.splitlines())
    try:
        lines = counted_lines(report, files, score)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [Difference("scores", f"{type(error).__name__}: {error}", "what cards have")]
    found = [Difference(f"line on {what}", "missing", line) for what, line in lines.items() if line not in there]
    if score is not None and "dataset" in score:
        kind = "accuracy" if "accuracy" in score else "perplexity"
        values = [value for _, value in results_of(read_metadata(text).get("model-index"), score)]
        found += [Difference(f"{kind} in model-index", value, score[kind]) for value in values or [None]]
    return found
