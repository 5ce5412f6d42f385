"""Compare a card with the files that it describes, fact by fact and line by line."""

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
from hf_prune.checkpoint.files import CARD_DATA
from hf_prune.errors import DataError
from hf_prune.hub.card import render_card
from hf_prune.hub.card_data import PruningCardData, is_score_of_training, load_card_data, with_counted_facts
from hf_prune.hub.card_metadata import our_part, read_facts, read_metadata, text_checksum
from hf_prune.hub.card_surroundings import FACTS, in_any_order, other_data, parts_of, surroundings
from hf_prune.hub.checksums import differing, weights_digest
from hf_prune.hub.describe import full_report
from hf_prune.hub.folder_facts import counted_facts
from hf_prune.hub.licenses import inherited_license
from hf_prune.hub.measurements import MEASURED, measured_digests
from hf_prune.hub.verification import Difference
from hf_prune.structured.shrink_record import RECORD
from hf_prune.utils.front_matter import split_card

_COUNTED = ("parameters", "nonzero", "target_parameters", "removed", "nm_patterns")
_RESULTS = ".eval_results"  # where the Hub finds scores besides a card's metadata
SCORES = "scores (add --evaluate)"
DIVERGENCE = "how far predictions moved (add --evaluate --against MODEL)"
_CLAIMED = ("license", "score", "divergence")
_OURS = ("library_name", "tags")  # keys of the metadata that hf_prune decides; all others are the author's
_NOT_COUNTED = ("polish", "notes", "file_bytes", "before", "speed", "parameters_before")  # fields of a report
_PLAUSIBLE_SPEED = 2.0  # a speed-up may exceed the ratio of the sizes by this factor


def compare_facts(folder: Path, text: str, model: Any) -> tuple[list[Difference], tuple[str, ...]]:
    """Compare all facts of a card with the files of a checkpoint and the model in them.

    Args:
        folder: The checkpoint.
        text: Its card.
        model: The model, as loaded from the folder.

    Returns:
        Every fact, right or wrong, and what the card claims that files cannot show.
    """
    facts, report = read_facts(text), full_report(model).to_dict()
    shrunk = report["structure"] is not None
    numbers = {**report, "parameters": report["structure"]["parameters"]} if shrunk else report
    differences = [Difference(key, facts.get(key), numbers[key]) for key in _COUNTED[: 1 if shrunk else None]]
    counted = counted_facts(folder)
    differences += _compare_sizes(facts.get("files"), counted["files"])
    differences += _compare_checksums(facts.get("sha256"), counted["checksums"])
    differences.append(Difference("SHA-256 of the text", facts.get("text"), text_checksum(text)))
    differences += _compare_structure(model)
    claims: tuple[str, ...] = ()
    try:
        data = load_card_data(folder)
        expected = render_card(with_counted_facts(data, counted, report), text)
        differences += compare_text(expected, text, facts)
        differences += _compare_stored_facts(data, expected, text)
        differences += _compare_stored_checksums(data.checksums, counted["checksums"], facts.get("sha256"))
        differences += _compare_reports(data.report, report)
        differences += _compare_measured_weights(data, counted)
        claims = _claims(data, folder, text)
    except (DataError, jinja2.UndefinedError, AttributeError, KeyError, TypeError, ValueError) as error:
        differences.append(Difference("what the card is rendered from", str(error), "the facts in pruning_card.json"))
    around = (Difference(*fact, is_claim=fact[0] == "license in the metadata") for fact in surroundings(text))
    return [*differences, *around], claims


def _compare_sizes(claimed: Any, counted: Mapping[str, int]) -> list[Difference]:
    claimed = claimed if isinstance(claimed, dict) else {}
    names = sorted({*claimed, *counted}, key=str)
    return [Difference(f"bytes of {name}", claimed.get(name), counted.get(name)) for name in names]


def _compare_checksums(claimed: Any, counted: Mapping[str, str]) -> list[Difference]:
    claimed = claimed if isinstance(claimed, dict) else {}
    names = sorted({*(claimed.keys() & counted.keys()), *differing(claimed, counted)}, key=str)
    return [Difference(f"SHA-256 of {name}", claimed.get(name), counted.get(name)) for name in names]


def _compare_stored_checksums(stored: Any, counted: Mapping[str, str], claimed: Any) -> list[Difference]:
    """The checksums in ``pruning_card.json``, where those in the card do not already show the difference."""
    shown = set(differing(claimed if isinstance(claimed, dict) else {}, counted))
    names = set(differing(stored if isinstance(stored, Mapping) else {}, counted)) - shown
    return [
        Difference(f"SHA-256 of {name} in {CARD_DATA}", stored.get(name), counted.get(name)) for name in sorted(names)
    ]


def compare_text(expected: str, text: str, facts: Mapping[str, Any]) -> Iterator[Difference]:
    """Compare our part of a card line by line, and its metadata key by key.

    Args:
        expected: The card rendered from what was counted.
        text: The card.
        facts: The facts in the metadata of the card.
    """
    claimed_lines, lines = (str(our_part(card)).splitlines() for card in (text, expected))
    counts, start = (len(claimed_lines), len(lines)), _common_lines(claimed_lines, lines)
    # Lines that are the same at the end are left out too, so that one added line is one difference.
    end = _common_lines(claimed_lines[start:][::-1], lines[start:][::-1])
    claimed_lines, lines = claimed_lines[start : len(claimed_lines) - end], lines[start : len(lines) - end]
    for i, (claimed, right) in enumerate(itertools.zip_longest(claimed_lines, lines, fillvalue="nothing"), start + 1):
        if claimed != right:
            yield Difference(f"line {i} of the text", claimed, right)
    yield Difference("lines of the text", *counts)
    checked = {*_COUNTED, "files", "sha256", "text"}
    for name, right in read_facts(expected).items():
        if name not in checked:
            yield Difference(name, facts.get(name), right, is_claim=name in _CLAIMED)
    for name in set(facts) - set(read_facts(expected)) - checked:
        yield Difference(str(name), facts[name], None)
    rendered, metadata = (in_any_order(read_metadata(card)) for card in (expected, text))
    for name in sorted({*rendered, *metadata} - {FACTS}, key=str):
        is_claim = name not in _OURS
        yield Difference(f"{name} in the metadata", metadata.get(name), rendered.get(name), is_claim=is_claim)


def _common_lines(lines: Sequence[str], others: Sequence[str]) -> int:
    """How many lines at the beginning are the same."""
    shorter = min(len(lines), len(others))
    return next((i for i, (a, b) in enumerate(zip(lines, others, strict=False)) if a != b), shorter)


def _compare_stored_facts(data: PruningCardData, expected: str, text: str) -> Iterator[Difference]:
    """Whether ``pruning_card.json`` renders the same card: it may be wrong where the card is right."""
    stored = render_card(data, text)
    claimed, right = ({**read_facts(card), "files": {}, "sha256": {}} for card in (stored, expected))
    same = our_part(stored) == our_part(expected) and claimed == right
    yield Difference("pruning_card.json", "the same" if same else "another card", "the same")


def _compare_reports(claimed: Mapping[str, Any], counted: Mapping[str, Any]) -> Iterator[Difference]:
    """The numbers of the stored report that were counted differently, whether the card shows them or not."""
    if counted["structure"] is not None:  # the other numbers may be of the model before shrinking
        claimed, counted = claimed.get("structure") or {}, counted["structure"]
    claimed_values, values = dict(_leaves(claimed)), dict(_leaves(counted))
    for name in {**values, **claimed_values}:
        right = values.get(name)
        near = 1e-6 * abs(right) + 1e-9 if isinstance(right, float) else 0.0  # sums may be added in another order
        difference = Difference(f"{name} in pruning_card.json", claimed_values.get(name), right, near)
        if not difference.is_same:
            yield difference


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every counted value in a report, by its path."""
    if isinstance(value, Mapping):
        items = [
            (f"{name}.{key}" if name else str(key), item) for key, item in value.items() if key not in _NOT_COUNTED
        ]
    elif isinstance(value, list | tuple):
        items = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
    else:
        yield name, value
        return
    if not items:
        yield name, "empty"
    for path, item in items:
        yield from _leaves(item, path)


def _compare_measured_weights(data: PruningCardData, counted: Mapping[str, Any]) -> Iterator[Difference]:
    """Whether scores and timings were measured on these weights, if they say on which."""
    weights = weights_digest(counted["checksums"])
    for name in MEASURED:
        measured = getattr(data, name)
        if measured is None or (name == "evaluation" and is_score_of_training(data)):
            continue
        digests = measured_digests(measured) or ["none"]
        claimed = weights if weights in digests else digests[0]
        yield Difference(f"SHA-256 of the weights of the {name}", claimed, weights)


def _claims(data: PruningCardData, folder: Path, text: str) -> tuple[str, ...]:
    """What the card says that cannot be counted in the files."""
    structure = data.report.get("structure")
    before, _, after = parts_of(split_card(text)[1]) or ("", "", "")
    license_ = read_metadata(text).get("license")
    claims = {
        "sizes of the dense model": structure,
        SCORES: data.evaluation,
        DIVERGENCE: ((data.evaluation or {}).get("comparison") or {}).get("divergence"),
        "the score of the dense model": (data.evaluation or {}).get("dense"),
        "what the dense model writes": ((data.evaluation or {}).get("generation") or {}).get("dense"),
        "benchmarks": (data.evaluation or {}).get("benchmarks"),
        "timings": data.latency or (structure or {}).get("speed"),
        "timings on other kernels": data.acceleration,
        "what training did": data.training,
        "the name": data.name,
        "versions": data.versions or None,
        _describe_license(license_, data.base_model): license_,
        "the data": data.dataset,
        "what was polished": data.report.get("polish") or None,
        "what was rounded": data.rounded or None,
        "the base model": data.base_model,
        "the language": data.language,
        "the calibration data": data.calibration,
        "the output of the example": data.example,
        "the command": data.command,
        "the author's own words": (before + after).strip() or None,
        f"the results in {_RESULTS}": (folder / _RESULTS).exists() or None,
    }
    results = (f"the author's result on {name}" for name in other_data(text))
    return (*(name for name, value in claims.items() if value is not None), *results)


def _describe_license(claimed: Any, base: str | None) -> str:
    """The license as a claim, beside the license that the card of the base model names, if there is one."""
    known = None if claimed is None or base is None else inherited_license(base).get("license")
    return f"the license ({claimed}{f'; the card of {base} says {known}' if known else ''})"


def _compare_structure(model: Any) -> Iterator[Difference]:
    """Whether a shrunk model can have been as large, and become as much faster, as its config says.

    The size before shrinking is bounded from above: every group of units gets back the units that the config says it
    lost, and every list of layers gets back its layers at the size of the largest one that remains.
    """
    record = getattr(model.config, RECORD, None)
    if not isinstance(record, dict):
        return
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    groups, units = find_unit_groups(model), record.get("units", {})
    before = {group.name: units.get(group.name, {}).get("before", group.units) for group in groups}
    for group in groups:
        if group.config and group.name in units:  # where the config still holds the size of the dense model
            size = getattr(model.config, group.config[0], None)
            dense = size // group.per_unit[0] if isinstance(size, int) else group.units
            if dense != group.units:
                yield Difference(f"{group.kind}s before at {group.name}, in config.json", before[group.name], dense)
    removed = {g.name: (before[g.name] - g.units) * g.parameters_per_unit(parameters) for g in groups}
    total: float = sum(p.numel() for p in model.parameters()) + sum(removed.values())
    ratio = max([before[group.name] / max(1, group.units) for group in groups], default=1.0)
    for stack in layer_lists(model):
        entry = record.get("layers", {}).get(stack.name.removeprefix(base_prefix(model)), {})
        removed_layers = entry.get("before", len(stack.layers)) - len(stack.layers)
        sizes = [
            sum(p.numel() for p in layer.parameters())
            + sum(removed[group.name] for group in groups if (stack.name, i) in group.layers)
            for i, layer in enumerate(stack.layers)
        ]
        total += removed_layers * max(sizes) if sizes else math.inf
        ratio *= (len(stack.layers) + removed_layers) / max(1, len(stack.layers))
    if any(group.kind == "channel" for group in groups):  # weights between two blocks grow with the channels of both
        total *= ratio
    hidden, size = record.get("hidden_size"), getattr(model.config, "hidden_size", None)
    if isinstance(hidden, dict) and isinstance(hidden.get("before"), int) and isinstance(size, int) and size:
        total *= (hidden["before"] / size) ** 2  # matrices read hidden states, write them, or do both
    claimed = record.get("parameters_before")
    possible = isinstance(claimed, int) and claimed <= total
    yield Difference("parameters before, in config.json", claimed, claimed if possible else f"at most {total:,.0f}")
    if (speed := record.get("speed")) is not None:
        faster = speed.get("measured") if isinstance(speed, dict) else None
        limit = _PLAUSIBLE_SPEED * ratio
        possible = isinstance(faster, int | float) and 0 < faster <= limit
        yield Difference("speed-up, in config.json", faster, faster if possible else f"at most {limit:.3g}")
