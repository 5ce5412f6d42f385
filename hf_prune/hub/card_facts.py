"""The facts of a card, compared with what the files say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.architectures.layers import layer_lists
from hf_prune.architectures.modules import base_prefix
from hf_prune.errors import DataError
from hf_prune.hub.card import render_card
from hf_prune.hub.card_data import (
    PruningCardData,
    counted_facts,
    is_of_training,
    load_card_data,
    measured_of,
    recounted,
)
from hf_prune.hub.card_metadata import our_part, read_facts, read_metadata, text_checksum
from hf_prune.hub.card_surroundings import FACTS, in_any_order, other_data, parts_of, surroundings
from hf_prune.hub.checksums import differing, weights_digest
from hf_prune.hub.describe import full_report
from hf_prune.hub.licenses import inherited_license
from hf_prune.hub.verification import Difference
from hf_prune.structured.shrink_record import RECORD
from hf_prune.utils.front_matter import split_card

_COUNTED = ("parameters", "nonzero", "target_parameters", "removed", "nm_patterns")
_RESULTS = ".eval_results"  # where the Hub takes scores from besides a card's metadata
_CLAIMED = ("license", "score")
_OURS = ("library_name", "tags")  # of the metadata; all else in it, the author says
_NOT_COUNTED = ("polish", "notes", "file_bytes", "before", "speed", "parameters_before")  # of a report
_SURE = 2.0  # a speed-up beyond what became smaller, times this, is none that was measured


def compare_facts(folder: Path, text: str, model: Any) -> tuple[list[Difference], tuple[str, ...]]:
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
        found += [*compare_text(expected, text, facts), *_stored(data, expected, text), *_reported(data.report, report)]
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


def compare_text(expected: str, text: str, facts: Mapping[str, Any]) -> Iterator[Difference]:
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


def _structure(model: Any) -> Iterator[Difference]:
    """Whether the model can have been as large, and become as much faster, as its config says."""
    record = getattr(model.config, RECORD, None)
    if not isinstance(record, dict):
        return
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    sites, units = find_unit_groups(model), record.get("units", {})
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
