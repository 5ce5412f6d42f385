"""Whether a checkpoint is what its card says: everything is counted again from the files."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from hf_prune.card_data import (
    PruningCardData,
    checksums,
    counted_facts,
    differing,
    inherited_license,
    is_of_training,
    load_card_data,
    measured_of,
    recounted,
    weights_digest,
)
from hf_prune.card_surroundings import FACTS, in_any_order, other_data, parts_of, surroundings
from hf_prune.cards import (
    as_saved,
    full_report,
    our_part,
    read_facts,
    read_metadata,
    render_card,
    text_checksum,
)
from hf_prune.errors import CheckpointError, ConfigError, DataError
from hf_prune.front_matter import read_card, split_card
from hf_prune.hub import download_checkpoint
from hf_prune.shrinking import RECORD
from hf_prune.sites import base_prefix, find_sites, layer_lists
from hf_prune.tables import first_few, format_table

_SHA256 = re.compile("[0-9a-f]{64}")
_COUNTED = ("parameters", "nonzero", "target_parameters", "removed", "nm_patterns")
_RESULTS = ".eval_results"  # where the Hub takes scores from besides a card's metadata
_CLAIMED = ("license", "score")
_OURS = ("library_name", "tags")  # of the metadata; all else in it, the author says
_NOT_COUNTED = ("polish", "notes", "file_bytes", "before", "speed", "parameters_before")  # of a report
_SURE = 2.0  # a speed-up beyond what became smaller, times this, is none that was measured


@dataclass(frozen=True)
class Difference:
    """One fact of a card.

    Args:
        name: Which one.
        said: What the card says.
        found: What was counted.
        tolerance: How far apart numbers may be.
        claimed: Whether files do not tell it, so that ``found`` is only what the author said elsewhere.
    """

    name: str
    said: Any
    found: Any
    tolerance: float = 0.0
    claimed: bool = False

    @property
    def is_same(self) -> bool:
        """Whether the card is right."""
        if self.tolerance and isinstance(self.said, int | float) and isinstance(self.found, int | float):
            return abs(self.said - self.found) <= self.tolerance
        return bool(_json(self.said) == _json(self.found))  # NaN is NaN


@dataclass(frozen=True)
class Verification:
    """A card beside what was counted. ``print(verification)`` shows it as a table.

    Args:
        source: The folder or repository.
        facts: All facts of the card.
        claims: What the card says besides, and nobody can count in the files.
    """

    source: str
    facts: tuple[Difference, ...]
    claims: tuple[str, ...] = ()

    @property
    def is_right(self) -> bool:
        """Whether every fact is."""
        return all(fact.is_same for fact in self.facts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "source": self.source,
            "is_right": self.is_right,
            "facts": [{key: _json(value) for key, value in vars(fact).items()} for fact in self.facts],
            "claims": list(self.claims),
        }

    def __str__(self) -> str:
        rows = [
            [fact.name, _show(fact.said), "" if fact.claimed and fact.is_same else _show(fact.found), _verdict(fact)]
            for fact in self.facts
        ]
        wrong = sum(not fact.is_same for fact in self.facts)
        end = f"{wrong} of {len(self.facts)} facts of the card are wrong." if wrong else "What was counted is right."
        claims = f"\nNot counted, since files do not tell: {', '.join(self.claims)}." if self.claims else ""
        return f"{format_table(['fact', 'card', 'counted', ''], rows, left=1)}\n{end}{claims}"


def _verdict(fact: Difference) -> str:
    return "DIFFERENT" if not fact.is_same else "claimed" if fact.claimed else ""


def _json(value: Any) -> Any:
    """For JSON, which has neither NaN nor dates and keys of any kind: YAML has."""
    if isinstance(value, dict):
        return {str(key): _json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json(each) for each in value]
    infinite = isinstance(value, float) and not math.isfinite(value)
    return value if not infinite and (value is None or isinstance(value, bool | int | float | str)) else str(value)


def _show(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value[:16]}…" if isinstance(value, str) and _SHA256.fullmatch(value) else str(value)


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
    from hf_prune.auto import load_native

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
    model = load_native(str(folder))
    found, claims = _facts(folder, text, model)
    if score is not None and isinstance(said, dict):
        found += _again(said, score(str(folder)))
    return Verification(source, tuple(found), claims)


def check_card(folder: Path, model: Any = None) -> None:
    """See that a folder's card, if it has one of ours, is right: as :func:`verify_checkpoint` does.

    Args:
        folder: A checkpoint.
        model: The model that is saved in it, if it is at hand; None loads it.

    Raises:
        CheckpointError: If it is not, or the files are damaged.
        DataError: If its metadata is no YAML.
    """
    from hf_prune.auto import load_native

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
    model = load_native(str(folder)) if model is None else as_saved(model, folder)
    _refuse(_facts(folder, text, model)[0], f"{path} is not right", f"see hf-prune verify {folder}; {advice}")


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
    _refuse([*_rendered(render_card(data, text), text, read_facts(text)), *around], what, advice)


def _refuse(facts: Sequence[Difference], what: str, advice: str) -> None:
    wrong = [f"{fact.name}: {_show(fact.said)}, expected {_show(fact.found)}" for fact in facts if not fact.is_same]
    if wrong:
        raise CheckpointError(f"{what}: {'; '.join(wrong[:3])}: {advice}")


def _facts(folder: Path, text: str, model: Any) -> tuple[list[Difference], tuple[str, ...]]:
    """All facts of a card beside what the files, and the model in them, tell; and what is only claimed."""
    facts, report = read_facts(text), full_report(model).to_dict()
    shrunk = report["structure"] is not None
    counted = {**report, "parameters": report["structure"]["parameters"]} if shrunk else report
    found = [Difference(key, facts.get(key), counted[key]) for key in _COUNTED[: 1 if shrunk else None]]
    files = counted_facts(folder)
    found += _by_name("bytes of", facts.get("files"), files["files"])
    found += _sums(facts.get("sha256"), files["checksums"])
    found.append(Difference("SHA-256 of the text", facts.get("text"), text_checksum(text)))
    found += _structure(model)
    claims: tuple[str, ...] = ()
    try:
        data = load_card_data(folder)
        expected = render_card(recounted(data, files, report), text)
        found += [*_rendered(expected, text, facts), *_stored(data, expected, text), *_reported(data.report, report)]
        found += _measured(data, files)
        claims = _claims(data, folder, text)
    except (DataError, jinja2.UndefinedError, AttributeError, KeyError, TypeError, ValueError) as error:
        found.append(Difference("what the card is rendered from", str(error), "the facts in pruning_card.json"))
    around = (Difference(*each, claimed=each[0] == "license in the metadata") for each in surroundings(text))
    return [*found, *around], claims


def _by_name(what: str, said: Any, found: Mapping[str, Any]) -> list[Difference]:
    said = said if isinstance(said, dict) else {}
    return [Difference(f"{what} {name}", said.get(name), found.get(name)) for name in sorted({*said, *found}, key=str)]


def _sums(said: Any, found: Mapping[str, str]) -> list[Difference]:
    said = said if isinstance(said, dict) else {}
    names = {*(name for name in said if name in found), *differing(said, found)}
    return [Difference(f"SHA-256 of {name}", said.get(name), found.get(name)) for name in sorted(names, key=str)]


def _rendered(expected: str, text: str, facts: Mapping[str, Any]) -> Iterator[Difference]:
    """Our part line by line, and the metadata that is ours key by key."""
    theirs, ours = (str(our_part(each)).splitlines() for each in (text, expected))
    lengths, start = (len(theirs), len(ours)), _alike(theirs, ours)
    end = _alike(theirs[start:][::-1], ours[start:][::-1])
    theirs, ours = theirs[start : len(theirs) - end], ours[start : len(ours) - end]
    for i, (said, right) in enumerate(itertools.zip_longest(theirs, ours, fillvalue="nothing"), start + 1):
        if said != right:
            yield Difference(f"line {i} of the text", said, right)
    yield Difference("lines of the text", *lengths)
    checked = {*_COUNTED, "files", "sha256", "text"}
    for name, right in read_facts(expected).items():
        if name not in checked:
            yield Difference(name, facts.get(name), right, claimed=name in _CLAIMED)
    for name in set(facts) - set(read_facts(expected)) - checked:
        yield Difference(str(name), facts[name], None)
    front, metadata = (in_any_order(read_metadata(each)) for each in (expected, text))
    for name in sorted({*front, *metadata} - {FACTS}, key=str):
        yield Difference(f"{name} in the metadata", metadata.get(name), front.get(name), claimed=name not in _OURS)


def _alike(some: Sequence[str], others: Sequence[str]) -> int:
    """How many lines at the beginning are the same."""
    return next((i for i, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), min(len(some), len(others)))


def _stored(data: PruningCardData, expected: str, text: str) -> Iterator[Difference]:
    """What ``pruning_card.json`` says that is not so, though the card may be right."""
    stored = render_card(data, text)
    (said, right) = ({**read_facts(each), "files": {}, "sha256": {}} for each in (stored, expected))
    same = our_part(stored) == our_part(expected) and said == right
    yield Difference("pruning_card.json", "the same" if same else "another card", "the same")


def _reported(said: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Difference]:
    """What the stored report counted otherwise, number by number, whether the card shows it or not."""
    if found["structure"] is not None:  # the rest may be of the larger model
        said, found = said.get("structure") or {}, found["structure"]
    theirs, ours = dict(_leaves(said)), dict(_leaves(found))
    for name in {**ours, **theirs}:
        there, right = theirs.get(name), ours.get(name)
        near = 1e-6 * abs(right) + 1e-9 if isinstance(right, float) else 0.0  # sums are added up in another order
        difference = Difference(f"{name} in pruning_card.json", there, right, near)
        if not difference.is_same:
            yield difference


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything that was counted in a report, by where it stands."""
    if isinstance(value, Mapping):
        parts = [
            (f"{name}.{key}" if name else str(key), each) for key, each in value.items() if key not in _NOT_COUNTED
        ]
    elif isinstance(value, list | tuple):
        parts = [(f"{name}[{i}]", each) for i, each in enumerate(value)]
    else:
        yield name, value
        return
    if not parts:
        yield name, "empty"
    for inner, each in parts:
        yield from _leaves(each, inner)


def _measured(data: PruningCardData, files: Mapping[str, Any]) -> Iterator[Difference]:
    """Whether scores and timings are of these weights, where they say of which."""
    weights = weights_digest(files["checksums"])
    for name, measured in (("evaluation", data.evaluation), ("latency", data.latency)):
        if measured is not None and not is_of_training(data, name):
            said = measured_of(measured) or ["none"]
            yield Difference(f"SHA-256 of the weights of the {name}", weights if weights in said else said[0], weights)


def _claims(data: PruningCardData, folder: Path, text: str) -> tuple[str, ...]:
    structure = data.report.get("structure")
    before, _, after = parts_of(split_card(text)[1]) or ("", "", "")
    found = {
        "sizes of the dense model": structure,
        "scores (add --evaluate)": data.evaluation,
        "timings": data.latency or (structure or {}).get("speed"),
        "what training did": data.training,
        "the name": data.name,
        "versions": data.versions or None,
        _license(read_metadata(text).get("license"), data.base_model): read_metadata(text).get("license"),
        "the data": data.dataset,
        "what was polished": data.report.get("polish") or None,
        "what was rounded": data.rounded or None,
        "the base model": data.base_model,
        "the command": data.command,
        "the author's own words": (before + after).strip() or None,
        f"the results in {_RESULTS}": (folder / _RESULTS).exists() or None,
    }
    others = (f"the author's result on {name}" for name in other_data(text))
    return (*(name for name, value in found.items() if value is not None), *others)


def _license(said: Any, base: str | None) -> str:
    """The license as a claim, beside what the card of the base model says where that is known."""
    known = None if said is None or base is None else inherited_license(base).get("license")
    return f"the license ({said}{f'; the card of {base} says {known}' if known else ''})"


# --- what was taken out -------------------------------------------------------------------------------------


def _structure(model: Any) -> Iterator[Difference]:
    """Whether the model can have been as large, and become as much faster, as its config says."""
    record = getattr(model.config, RECORD, None)
    if not isinstance(record, dict):
        return
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    sites, units = find_sites(model), record.get("units", {})
    before = {site.name: units.get(site.name, {}).get("before", site.units) for site in sites}
    for site in sites:
        if site.config and site.name in units:  # a config whose size is not that of now tells that of the dense model
            size = getattr(model.config, site.config[0], None)
            dense = size // site.per_unit[0] if isinstance(size, int) else site.units
            if dense != site.units:
                yield Difference(f"{site.kind}s before at {site.name}, in config.json", before[site.name], dense)
    grown = {site.name: (before[site.name] - site.units) * site.parameters_per_unit(parameters) for site in sites}
    total: float = sum(p.numel() for p in model.parameters()) + sum(grown.values())
    ratio = max([before[site.name] / max(1, site.units) for site in sites], default=1.0)
    for stack in layer_lists(model):
        entry = record.get("layers", {}).get(stack.name.removeprefix(base_prefix(model)), {})
        gone = entry.get("before", len(stack.layers)) - len(stack.layers)
        sizes = [
            sum(p.numel() for p in layer.parameters())
            + sum(grown[s.name] for s in sites if (stack.name, i) in s.layers)
            for i, layer in enumerate(stack.layers)
        ]
        total += gone * max(sizes) if sizes else math.inf
        ratio *= (len(stack.layers) + gone) / max(1, len(stack.layers))
    if any(site.kind == "channel" for site in sites):  # what two blocks share grows with both
        total *= ratio
    said = record.get("parameters_before")
    right = isinstance(said, int) and said <= total
    yield Difference("parameters before, in config.json", said, said if right else f"at most {total:,.0f}")
    if (speed := record.get("speed")) is not None:
        faster = speed.get("measured") if isinstance(speed, dict) else None
        right = isinstance(faster, int | float) and 0 < faster <= _SURE * ratio
        yield Difference("speed-up, in config.json", faster, faster if right else f"at most {_SURE * ratio:.3g}")


def _again(said: Mapping[str, Any], found: Mapping[str, Any]) -> list[Difference]:
    error = said.get("standard_error")
    near = error / 10 if isinstance(error, int | float) else 0.0
    tolerances = {"accuracy": near, "perplexity": near, "standard_error": near}
    return [
        Difference(key, value, found.get(key), tolerances.get(key, 0.0))
        for key, value in said.items()
        if key not in ("dataset", "data")
    ]
