"""Whether a checkpoint is what its card says: everything is counted again from the files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from hf_prune.cards import read_facts
from hf_prune.errors import CheckpointError
from hf_prune.tables import format_table


@dataclass(frozen=True)
class Difference:
    """One fact of a card.

    Args:
        name: Which one.
        said: What the card says.
        found: What was counted.
    """

    name: str
    said: Any
    found: Any

    @property
    def is_same(self) -> bool:
        """Whether the card is right."""
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
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def verify_checkpoint(
    source: str, *, revision: str | None = None, score: Callable[[str], dict[str, Any]] | None = None
) -> Verification:
    """Count everything again that a card gives to programs.

    Args:
        source: A folder, or a repository on the Hub, which is downloaded.
        revision: Of the repository.
        score: Scores the checkpoint in a folder as ``hf-prune evaluate`` does; None leaves scores unchecked.

    Raises:
        CheckpointError: If the card has no facts, or the files are damaged or do not belong together.
    """
    from hf_prune.auto import load_native
    from hf_prune.report import sparsity_report

    folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(source, revision=revision))
    card = folder / "README.md"
    facts = read_facts(card.read_text(encoding="utf-8")) if card.is_file() else {}
    if not facts:
        raise CheckpointError(
            f"{source} has no card with facts to verify: expected README.md with metadata under 'hf_prune'; write it "
            f"with hf-prune card"
        )
    model = load_native(str(folder))
    report = sparsity_report(model)
    counted = report.to_dict()
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    found = [Difference(key, facts.get(key), counted[key]) for key in _COUNTED if key in facts]
    if "nm_patterns" in facts:
        found.append(Difference("nm_patterns", list(facts["nm_patterns"]), list(counted["nm_patterns"])))
    said = facts.get("files") or {}
    for name in sorted({*said, *sizes}):
        found.append(Difference(f"bytes of {name}", said.get(name), sizes.get(name)))
    if score is not None:
        if "score" not in facts:
            raise CheckpointError(f"the card of {source} gives no score to verify: leave --evaluate out")
        again = score(str(folder))
        found += [Difference(key, value, again.get(key)) for key, value in facts["score"].items()]
    return Verification(source, tuple(found))


_COUNTED = ("parameters", "nonzero", "target_parameters", "removed")
