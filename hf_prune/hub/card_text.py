"""The text of a model card, rendered from its facts.

Pushed cards are compared with this text: a change of its words makes ``verify`` report every earlier card as wrong.
"""

from __future__ import annotations

import html
import importlib.resources
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from hf_prune.hub.card_data import PruningCardData
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.traits import criterion_paper, granularity_text
from hf_prune.utils.formatting import format_count

_NO_SPEED = (
    "Zeros alone bring no speed-up: a dense kernel multiplies by zero like by any other number. Nothing was timed."
)


def card_text(data: PruningCardData) -> str:
    """Our part of ``README.md``, as Markdown."""
    report = data.report
    structure = report.get("structure")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = importlib.resources.files("hf_prune").joinpath("templates/model_card.md").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        name=_plain(data.name),
        model_class=_plain(report["model"]),
        base_model=data.base_model,
        what=[*_counted(report), *_done(data)],
        scores=_scores(data),
        size=_size(report, data.files),
        before=f"{structure['parameters_before']:,}" if structure else None,
        speed=_speed(data),
        layers=_layers(report),
        pictures=[{"file": name, "text": _plain(text)} for name, text in data.pictures.items()],
        loading=_loading(data),
        made=_made(data),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _size(report: Mapping[str, Any], files: Mapping[str, int]) -> list[str]:
    """Cells of a row: parameters, nonzero parameters except for a shrunk model, bytes in memory, bytes on disk."""
    structure = report.get("structure")
    counts = [structure["parameters"]] if structure else [report["parameters"], report["nonzero"]]
    sizes = [(structure or report)["bytes"], sum(files.values())]
    return ["this model", *(f"{count:,}" for count in counts), *(f"{format_count(size)}B" for size in sizes)]


def _plain(text: str) -> str:
    """Escape a text so that it cannot become markup or break a table."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"[|`*\[\]\\$~]|\b_|_\b", lambda match: f"&#{ord(match[0])};", text)


def _counted(report: Mapping[str, Any]) -> list[str]:
    """Sentences about what was counted."""
    if (structure := report.get("structure")) is not None:
        now, before = structure["parameters"], structure["parameters_before"]
        return [f"Whole units were taken out: {now:,} of {before:,} parameters are left ({_share(now, before)})."]
    lines = []
    if report["removed"]:
        lines.append(
            f"{report['removed']:,} of the {report['target_parameters']:,} weights that were pruned are zero "
            f"({_share(report['removed'], report['target_parameters'])}); of all parameters "
            f"{_share(report['parameters'] - report['nonzero'], report['parameters'])} are."
        )
    if report.get("nm_patterns"):
        lines.append(f"Every pruned matrix has the pattern {_plain(', '.join(report['nm_patterns']))}.")
    return lines


def _done(data: PruningCardData) -> list[str]:
    """Sentences about how the model was pruned and trained."""
    lines = []
    if data.config is not None:
        lines.append(_method(data.config))
    if data.report.get("polish"):
        lines.append("Afterwards what is left was trained for a short while to put out what the dense model does.")
    if data.training is not None:
        lines.append(f"It was pruned while it was trained, for {data.training['steps']:,} steps.")
    if data.rounded:
        lines.append("The values that pruning left were rounded to int8, which is lossy.")
    return lines


def _method(config: PruningConfig) -> str:
    criterion = f"Criterion {config.criterion} ({criterion_paper(config)})"
    parts = [criterion, granularity_text(config), f"scope {config.scope}"]
    if config.allocation != "uniform":
        parts.append(f"allocation {config.allocation if isinstance(config.allocation, str) else 'by module'}")
    if config.repair is not None:
        parts.append(f"repair {config.repair}")
    if config.schedule is not None:
        parts.append(f"schedule {config.schedule.name}")  # type: ignore[union-attr]
    return _plain(", ".join(parts) + ".")


def _scores(data: PruningCardData) -> dict[str, Any] | None:
    evaluation = data.evaluation or {}
    score, dense, comparison = (evaluation.get(key) for key in ("evaluation", "dense", "comparison"))
    if score is None:
        return None
    where = _plain(data.dataset or data_name(data) or "its data")
    rows = [["this model", *_figures(score)]]
    if dense is not None:
        rows.append(["dense", *_figures(dense)])
    if "accuracy" not in score:
        note = f"Measured on {where}, {score.get('n_tokens', 0):,} tokens."
        return {"names": ["perplexity"], "rows": rows, "note": note}
    note = f"Measured on {where}, {_plain(score.get('split') or 'all of it')}; ± is one standard error."
    if comparison is not None:
        low, high = comparison["interval"]
        note += (
            f" On the same examples the drop is {comparison['drop']:.2f} points ({100 * comparison['confidence']:g} % "
            f"interval {low:.2f} to {high:.2f}); McNemar's exact p = {comparison['p_value']:.3g}."
        )
        if comparison.get("doubt"):
            note += f" Warning: {_plain(comparison['doubt'])}."
    return {"names": ["accuracy", "n"], "rows": rows, "note": note}


def data_name(data: PruningCardData) -> str:
    """The name of the data that was scored, without its folders; empty if it is not known."""
    return Path(str(((data.evaluation or {}).get("evaluation") or {}).get("source") or "")).name


def _figures(score: Mapping[str, Any]) -> list[str]:
    """Cells of a row: the perplexity, or the accuracy and the number of examples."""
    if "accuracy" not in score:
        return [f"{score['perplexity']:.3f}"]
    return [f"{100 * score['accuracy']:.2f} % ± {100 * score['standard_error']:.2f}", f"{score['n']:,}"]


def _speed(data: PruningCardData) -> str:
    structure = data.report.get("structure") or {}
    if data.latency is not None:
        lines = ["| model | batch x length | median | speed-up |", "|---|---|---|---|"]
        for point in data.latency["points"]:
            against = point.get("against")
            faster = "" if against is None else f"{against['value']:.2f}x" + ("" if against["is_real"] else " (noise)")
            size = f"{point['batch_size']} x {point['length']}"
            lines.append(
                f"| {_plain(Path(point['model']).name)} | {size} | {1000 * point['median']:.1f} ms | {faster} |"
            )
        how = data.latency
        lines.append("")
        lines.append(
            _plain(
                f"Timed in turns, {how['rounds']} rounds, {how['threads']} thread(s), {how['dtype']}, {how['device']}, "
                f"torch {how['torch']}."
            )
        )
        return "\n".join(lines)
    if (speed := structure.get("speed")) is not None:
        return _plain(
            f"{speed['measured']:.2f} times as fast as the dense model (batch {speed['batch_size']} x "
            f"{speed['length']} tokens, {speed['dtype']}, {speed['device']}, {speed['threads']} thread(s), "
            f"{speed['rounds']} rounds in turns)."
        )
    return "Nothing was timed. Its matrices are smaller than those of the dense model." if structure else _NO_SPEED


def _layers(report: Mapping[str, Any]) -> list[list[str]]:
    if (structure := report.get("structure")) is not None:
        return [
            [
                _plain(site["name"]),
                f"{site['units']:,} of {site['before']:,} {site['kind']}s",
                _share(removed, site["before"]),
            ]
            for site in structure["sites"]
            if (removed := site["before"] - site["units"]) >= 0
        ]
    rows = []
    for tensor in report["tensors"]:
        if tensor["is_target"]:
            shape = " x ".join(map(str, tensor["shape"]))
            zero = _share(tensor["parameters"] - tensor["nonzero"], tensor["parameters"])
            rows.append([_plain(tensor["name"]), shape, zero])
    return rows


def _loading(data: PruningCardData) -> str:
    name = re.sub(r"[^\w./-]", "_", data.name)
    model = str(data.report["model"])
    auto = next((f"AutoModelFor{end}" for end in _ENDINGS if model.endswith(f"For{end}")), "AutoModel")
    lines = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("{name}")']
    if data.needs_plugin:
        lines.insert(0, "import hf_prune  # pip install hf_prune: tells transformers how to read it")
    if data.remote_code:
        lines += ["", "# or where hf_prune is not installed, with the code in this repository:"]
        lines.append(f'model = {auto}.from_pretrained("{name}", trust_remote_code=True)')
    return "\n".join(lines)


_ENDINGS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "CausalLM", "MaskedLM",
            "ImageClassification", "Seq2SeqLM")  # fmt: skip


def _made(data: PruningCardData) -> list[str]:
    lines = []
    if data.command:
        lines.append(f"Command: <code>{_plain(data.command)}</code>")
        if data.versions:
            with_ = ", ".join(f"{name} {version}" for name, version in data.versions.items())
            lines.append(_plain(f"With {with_}."))
    return lines


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "0 %"
