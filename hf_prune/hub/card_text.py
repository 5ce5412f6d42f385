"""The text of a model card, rendered from its facts.

Pushed cards are compared with this text: a change of its words makes ``verify`` report every earlier card as wrong.
"""

from __future__ import annotations

import html
import importlib.resources
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from hf_prune.hub.card_data import PruningCardData
from hf_prune.hub.card_language import benchmark_rows, perplexity_ratio, written
from hf_prune.hub.card_speed import speed_text
from hf_prune.hub.card_words import headline, task_of
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.traits import criterion_paper, granularity_text
from hf_prune.utils.formatting import format_count


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
        headline=headline(data),
        task=(task_of(str(report["model"])) or ("", ""))[1],
        labels=_plain(data.labels),
        what=[*_counted(report), *_done(data)],
        scores=_scores(data),
        written=written(data.evaluation or {}, _plain),
        benchmarks=benchmark_rows(data.evaluation or {}, _plain),
        size=_size(report, data.files),
        dense=_dense_size(report),
        is_shrunk=bool(structure),
        speed=speed_text(data, _plain),
        layers=_layers(report),
        pictures=[{"file": name, "text": _plain(text)} for name, text in data.pictures.items()],
        loading=_loading(data),
        made=_made(data),
        paper=_plain(criterion_paper(data.config)) if data.config is not None else "",
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _size(report: Mapping[str, Any], files: Mapping[str, int]) -> list[str]:
    """Cells of a row: parameters, nonzero parameters except for a shrunk model, bytes in memory, bytes on disk."""
    structure = report.get("structure")
    counts = [structure["parameters"]] if structure else [report["parameters"], report["nonzero"]]
    sizes = [(structure or report)["bytes"], sum(files.values())]
    return ["this model", *(f"{count:,}" for count in counts), *(f"{format_count(size)}B" for size in sizes)]


def _dense_size(report: Mapping[str, Any]) -> list[str]:
    """The same cells of the dense model, as far as they are known: what has zeros has its shapes and its dtype."""
    if (structure := report.get("structure")) is not None:
        return ["dense", f"{structure['parameters_before']:,}", "", ""]
    return ["dense", f"{report['parameters']:,}", "", f"{format_count(report['bytes'])}B", ""]


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
    if "perplexity" in score:
        note = f"Measured on {where}, {score.get('n_tokens', 0):,} tokens."
        if "generation" in evaluation:  # what earlier versions measured has no interval in its card
            note += perplexity_ratio(evaluation)
        return {"names": ["perplexity"], "rows": rows, "note": note}
    test = "paired" if "metric" in score else "McNemar's exact"
    note = f"Measured on {where}, {_plain(score.get('split') or 'all of it')}; ± is one standard error."
    if comparison is not None:
        low, high = comparison["interval"]
        note += (
            f" On the same examples the drop is {comparison['drop']:.2f} points ({100 * comparison['confidence']:g} % "
            f"interval {low:.2f} to {high:.2f}); {test} p = {comparison['p_value']:.3g}."
        )
        if (moved := comparison.get("divergence")) is not None:
            note += (
                f" The mean KL divergence of its predictions from the dense model's is {moved['kl']:.4f} ± "
                f"{moved['kl_standard_error']:.4f} nats, and {moved['flips']:.2f} % ± "
                f"{moved['flips_standard_error']:.2f} of the answers changed."
            )
        if comparison.get("doubt"):
            note += f" Warning: {_plain(comparison['doubt'])}."
    return {"names": [score.get("metric", "accuracy"), "n"], "rows": rows, "note": note}


def data_name(data: PruningCardData) -> str:
    """The name of the data that was scored, without its folders; empty if it is not known."""
    return Path(str(((data.evaluation or {}).get("evaluation") or {}).get("source") or "")).name


def _figures(score: Mapping[str, Any]) -> list[str]:
    """Cells of a row: the perplexity, or the accuracy or rank score and the number of examples."""
    if "perplexity" in score:
        return [f"{score['perplexity']:.3f}"]
    if "metric" in score:
        return [f"{score['value']:.4f} ± {score['standard_error']:.4f}", f"{score['n']:,}"]
    return [f"{100 * score['accuracy']:.2f} % ± {100 * score['standard_error']:.2f}", f"{score['n']:,}"]


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
    blocks = ["import hf_prune  # pip install hf_prune: tells transformers how to read it"] if data.needs_plugin else []
    if data.sentences:
        by = re.sub(r"\W", "", data.sentences)
        use = 'predict([("…", "…")])' if by == "CrossEncoder" else 'encode(["…"])'
        trust = ", trust_remote_code=True" if data.remote_code else ""
        blocks = [] if data.remote_code else blocks  # one way suffices
        loads = [f"from sentence_transformers import {by}", "", f'model = {by}("{name}"{trust})', f"model.{use}"]
        return "\n".join([*blocks, *loads])
    if (task := task_of(str(data.report["model"]))) is not None:
        text = json.dumps((data.example or {}).get("input", "…"), ensure_ascii=False)
        blocks += ["from transformers import pipeline", "", f'pipe = pipeline("{task[0]}", model="{name}")']
        blocks += [f"pipe({text})", *(f"# {line}" for line in (data.example or {}).get("output", "").splitlines()), ""]
    model = str(data.report["model"])
    auto = _auto_class(model)
    lines = [*blocks, f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("{name}")']
    if data.remote_code:
        lines += ["", "# or where hf_prune is not installed, with the code in this repository:"]
        lines.append(f'model = {auto}.from_pretrained("{name}", trust_remote_code=True)')
    return "\n".join(lines)


def _auto_class(model: str) -> str:
    """The class of transformers that loads a class of models."""
    named = next((f"AutoModelFor{end}" for end in _ENDINGS if model.endswith(f"For{end}")), None)
    if named is None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as SEQ2SEQ

        if model in SEQ2SEQ.values():  # ForConditionalGeneration is also the end of models that read images
            return "AutoModelForSeq2SeqLM"
        return "AutoModelForCausalLM" if model.endswith("LMHeadModel") else "AutoModel"
    return named


_ENDINGS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "CausalLM", "MaskedLM",
            "ImageClassification", "Seq2SeqLM")  # fmt: skip


def _made(data: PruningCardData) -> list[str]:
    lines = [_plain(f"Calibrated on {data.calibration}.")] if data.calibration else []
    if data.command:
        lines.append(f"Command: <code>{_plain(data.command)}</code>")
        if data.versions:
            with_ = ", ".join(f"{name} {version}" for name, version in data.versions.items())
            lines.append(_plain(f"With {with_}."))
    return lines


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "0 %"
