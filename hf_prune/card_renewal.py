"""What hf_prune wrote into a model card, when the weights that it describes are written in another form."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import RepoCard

from hf_prune.cards import BEGIN, END, FACTS, read_card_data, render_card
from hf_prune.errors import DataError, HfPruneError
from hf_prune.files import write_json, write_text
from hf_prune.hub import is_repo_id
from hf_prune.packed_files import PackedFiles, file_paths
from hf_prune.report import SparsityReport, TensorReport, WeightStatistics
from hf_prune.unpacking import unpack

_REPORT, _TRAINING = "sparsity_report.json", "training_report.json"
_OF_VALUES = (_TRAINING, "layers.png", "weights.png")  # what rounding makes wrong
_MADE = "How it was made"
_KEPT = ("What it costs", "Speed", _MADE)  # sections that are true of the same values in any form
_ROUNDED = "* Then the values that pruning left were rounded to int8. Nothing was measured after that.\n\n"
_UNKNOWN = (HfPruneError, jinja2.UndefinedError, AttributeError, KeyError, TypeError, ValueError)


def renew_card(folder: Path, source: str, name: str, *, lossy: bool = False) -> tuple[str, tuple[str, ...]]:
    """Have the card in a folder describe the weights that are there now; what its author wrote stays.

    Scores, timings and how the model was made are in the card alone: they stay if the values are the same. After
    rounding, what was measured before is gone, and what can be counted is counted again. If there is no report to
    write the card from, what hf_prune wrote is taken out.

    Args:
        folder: A checkpoint that is being made, with the card and the reports of another one.
        source: What the folder of that one is called.
        name: What the new one will be called.
        lossy: Whether values were rounded.

    Returns:
        What became of the card, empty if there was nothing of ours in it; and the files that were taken out.
    """
    gone = _without_old_values(folder) if lossy else ()
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if BEGIN not in text and f"\n{FACTS}:" not in text:
        return "", gone
    try:
        old = RepoCard(text)
    except (TypeError, ValueError, yaml.YAMLError):
        return "README.md is as it was, also where it is wrong now: its metadata is no YAML.", gone
    if lossy:
        old.data.pop("model-index")
        old.data.pop(FACTS)
    try:
        write_text(path, _renewed(folder, old, source, name, lossy))
    except _UNKNOWN:
        write_text(path, _without_ours(old))
        return (
            "What hf_prune wrote in README.md is gone: nothing here tells it anew; save the model again, or see "
            "hf-prune card."
        ), gone
    if lossy:
        return "README.md describes the new files; what was measured before the rounding is gone from it.", gone
    return "README.md describes the new files.", gone


def _renewed(folder: Path, old: RepoCard, source: str, name: str, lossy: bool) -> str:
    before = _section(old.text)
    titles = re.findall(r"^# (.+)$", before, re.MULTILINE)
    title = html.unescape(titles[0]) if titles else source
    base = old.data.get("base_model")
    data = dataclasses.replace(
        read_card_data(folder),
        name=name if title == source else title,
        base_model=base if isinstance(base, str) and is_repo_id(base) else None,
    )
    facts = old.data.get(FACTS)
    new = RepoCard(render_card(data, str(old)))
    if not lossy and isinstance(facts, Mapping) and "score" in facts:
        new.data[FACTS] = {**new.data[FACTS], "score": facts["score"]}
    rendered = _section(new.text)
    new.text = new.text.replace(rendered, _merged(rendered, before, lossy))
    return str(new)


def _section(body: str) -> str:
    return body.partition(BEGIN)[2].partition(END)[0]


def _parts(section: str) -> dict[str, str]:
    """The parts of a section by heading."""
    return {part.partition("\n")[0].strip("# "): part for part in re.split(r"^(?=## )", section, flags=re.MULTILINE)}


def _merged(new: str, old: str, lossy: bool) -> str:
    """A new section with what the old one alone knows."""
    known, parts = _parts(old), {}
    for heading, part in _parts(new).items():
        if heading == "Size" and "What it costs" in known and not lossy:  # which stands before it
            parts["What it costs"] = known["What it costs"]
        if heading == "Limits" and (lossy or _MADE in known):
            parts[_MADE] = known.get(_MADE, f"## {_MADE}\n\n")
            parts[_MADE] = parts[_MADE].rstrip("\n") + "\n" + _ROUNDED if lossy else parts[_MADE]
        parts[heading] = known.get(heading, part) if heading in _KEPT and not lossy else part
    return "".join(parts.values())


def _without_ours(card: RepoCard) -> str:
    for key in (FACTS, "model-index"):
        card.data.pop(key)
    if BEGIN in card.text and END in card.text:
        before, after = card.text.partition(BEGIN)[0], card.text.partition(END)[2]
        card.text = "\n\n".join(part for part in (before.strip(), after.strip()) if part) + "\n"
    return str(card)


def _without_old_values(folder: Path) -> tuple[str, ...]:
    """Take out what rounding made wrong, and count again what can be counted."""
    try:
        training = folder / _TRAINING
        report = json.loads((training if training.is_file() else folder / _REPORT).read_text(encoding="utf-8"))
        recounted = _recounted(report["sparsity"] if training.is_file() else report, folder)
    except (OSError, *_UNKNOWN):
        recounted = None
    gone = tuple(name for name in (*_OF_VALUES, *([] if recounted else [_REPORT])) if (folder / name).is_file())
    for name in gone:
        (folder / name).unlink()
    if recounted:
        write_json(folder / _REPORT, recounted)
    return gone


def _recounted(report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A report with the zeros and statistics that rounding made.

    Raises:
        DataError: If it does not know a weight by the name that the checkpoint has for it.
    """
    if report.get("structure") is not None:  # the rest of it is of the larger model
        return dict(report)
    tensors = {entry["name"]: _tensor_report(entry) for entry in report["tensors"]}
    files = PackedFiles(file_paths(folder)[0])
    for name, header in files.headers.items():
        if header.lossy:
            if name not in tensors or tensors[name].shape != header.shape:
                raise DataError(f"the report does not know {name} of shape {header.shape}")
            weight = unpack(files.data(name), header)
            tensors[name] = dataclasses.replace(
                tensors[name], nonzero=int(weight.count_nonzero()), after=WeightStatistics.of(weight)
            )
    return SparsityReport(report["model"], tuple(tensors.values()), report["polish"]).to_dict()


def _tensor_report(entry: Mapping[str, Any]) -> TensorReport:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    for key in ("after", "before"):
        values[key] = None if values.get(key) is None else WeightStatistics(**values[key])
    values.pop("sparsity", None)
    return TensorReport(**values)
