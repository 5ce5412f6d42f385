"""Model cards that say what was measured, and nothing else: facts are read from files, and rendered as text."""

from __future__ import annotations

import dataclasses
import html
import importlib.metadata
import importlib.resources
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from hf_prune.checkpoint import MASK_FILE, StoredMasks, read_pruning
from hf_prune.config import UNIT_CRITERIA_OF, PruningConfig
from hf_prune.errors import CheckpointError, DataError
from hf_prune.files import write_json, write_text
from hf_prune.hub import card_of_base, is_repo_id
from hf_prune.registry import CRITERIA, parse_granularity
from hf_prune.report import sparsity_report
from hf_prune.shrinking import RECORD
from hf_prune.structure import is_ours
from hf_prune.structures import structure_report
from hf_prune.tables import format_count
from hf_prune.unpacking import is_packed, unseal

BEGIN, END = "<!-- hf_prune: begin -->", "<!-- hf_prune: end -->"
FACTS = "hf_prune"  # the key of the metadata that programs read
_FRONT = re.compile(r"\A---\n(.*?)\n---\n?", re.DOTALL)
_LICENSE = re.compile(r"[\w.-]+")
_LINK = re.compile(r"https?://[^\s<>\"'`]+")
_NO_SPEED = (
    "Zeros alone bring no speed-up: a dense kernel multiplies by zero like by any other number. Nothing was timed."
)
_PICTURES = {"layers.png": "Sparsity by layer", "weights.png": "Weights before and after"}


@dataclass(frozen=True)
class PruningCardData:
    """What a card is made of; what is None is left out of it.

    Args:
        name: What the model is called.
        report: What ``sparsity_report.json`` says.
        files: Sizes in bytes of the checkpoint's files, by name.
        config: The settings of the pruning.
        evaluation: What ``hf-prune evaluate --json`` printed, alone or with ``--against``.
        latency: What ``hf-prune bench --json`` printed, the dense model first.
        training: What ``training_report.json`` says.
        base_model: The Hub id of the dense model.
        dataset: The Hub id of the data that it was scored on.
        license: Its identifier; that of the base model applies.
        license_name: What a license is called whose identifier is ``"other"``.
        license_link: Where that one can be read.
        command: What made it.
        needs_plugin: Whether it loads only after ``import hf_prune``.
        remote_code: Whether it loads without it too, with ``trust_remote_code=True``.
        pictures: Files of pictures, with a text for each.
        tokens: Whether it is a language model.
        versions: Of the packages that made it, by name.
    """

    name: str
    report: Mapping[str, Any]
    files: Mapping[str, int]
    config: PruningConfig | None = None
    evaluation: Mapping[str, Any] | None = None
    latency: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    base_model: str | None = None
    dataset: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    command: str | None = None
    needs_plugin: bool = False
    remote_code: bool = False
    pictures: Mapping[str, str] = field(default_factory=dict)
    tokens: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; predictions of single examples are left out."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["config"] = None if self.config is None else self.config.to_dict()
        for kind, parts in (("evaluation", ("evaluation", "dense")), ("training", ("dense", "pruned"))):
            if values[kind] is not None:
                values[kind] = {
                    key: {k: v for k, v in value.items() if k not in ("predictions", "labels")}
                    if key in parts and isinstance(value, Mapping)
                    else value
                    for key, value in values[kind].items()
                }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruningCardData:
        """What :meth:`to_dict` described."""
        config = values.get("config")
        return cls(**{**values, "config": None if config is None else PruningConfig.from_dict(config)})


def read_card_data(folder: str | Path, **more: Any) -> PruningCardData:
    """What a checkpoint's own files say.

    Args:
        folder: A folder that ``hf-prune prune`` or ``train`` wrote.
        **more: Other fields of :class:`PruningCardData`; ``evaluation`` and ``latency`` may be paths of JSON files. A
            ``base_model`` lends its license if none is given; it may be a folder too, which lends nothing else.

    Raises:
        CheckpointError: If the folder has no report.
        DataError: If a file is no JSON.
    """
    folder = Path(folder)
    path, training = folder / "sparsity_report.json", folder / "training_report.json"
    found: dict[str, Any] = {}
    if training.is_file():
        found["training"] = _read(training)
        found["report"] = found["training"]["sparsity"]
        found["evaluation"] = {key: found["training"][key] for key in ("dense", "comparison")}
        found["evaluation"]["evaluation"] = found["training"]["pruned"]
    elif path.is_file():
        found["report"] = _read(path)
    else:
        raise CheckpointError(
            f"{folder} has neither sparsity_report.json nor training_report.json: expected a folder that hf-prune "
            f"prune or train wrote, whose numbers were counted"
        )
    config = _read(folder / "config.json")
    masks = folder / MASK_FILE
    settings = (config.get(RECORD) or {}).get("pruning_config")
    weights = next(iter(sorted(folder.glob("model*.safetensors"))), None)
    if weights is not None and is_packed(weights):
        found["config"], _ = read_pruning(unseal(weights).get("pruning", {}), weights)
    elif masks.is_file():
        found["config"] = StoredMasks(masks).config
    if found.get("config") is None and settings is not None:
        found["config"] = PruningConfig.from_dict(settings)
    found["needs_plugin"] = config.get("quantization_config", {}).get("quant_method") == "hf_prune"
    found["remote_code"] = is_ours(config.get("auto_map"))
    found["files"] = {p.name: p.stat().st_size for p in sorted(folder.glob("*.safetensors"))}
    found["pictures"] = {name: text for name, text in _PICTURES.items() if (folder / name).is_file()}
    found["tokens"] = any(name.endswith("ForCausalLM") for name in config.get("architectures") or [])
    found["name"] = folder.resolve().name
    found["versions"] = {name: importlib.metadata.version(name) for name in ("hf_prune", "torch", "transformers")}
    for key, value in more.items():
        if key in ("evaluation", "latency") and isinstance(value, str | Path):
            found[key] = _read(Path(value))
        elif value is not None:
            found[key] = value
    if (base := found.get("base_model")) is not None:
        if "license" not in found:
            found |= inherited_license(base)
        if Path(base).is_dir():  # and no Hub id
            del found["base_model"]
    return PruningCardData(**found)


def inherited_license(base_model: str) -> dict[str, str]:
    """What the card of a base model says of its license, which applies to every model that is made of it.

    Args:
        base_model: A folder, or a Hub id. The Hub is asked once; a folder wins.

    Returns:
        The fields ``license``, ``license_name`` and ``license_link`` of :class:`PruningCardData`; empty if the card
        names no license, or cannot be read.
    """
    folder = Path(base_model)
    if folder.is_dir():
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    else:
        text = card_of_base(base_model)
    try:
        metadata = _split(text or "")[0]
    except DataError:
        return {}
    if not _is_license(metadata.get("license")):
        return {}
    found = {"license": metadata["license"]}
    if metadata["license"] == "other":
        if _is_license(name := metadata.get("license_name")):
            found["license_name"] = name
        if isinstance(link := metadata.get("license_link"), str):
            if not folder.is_dir() and re.fullmatch(r"[\w.-]+", link):
                link = f"https://huggingface.co/{base_model}/blob/main/{link}"
            if _LINK.fullmatch(link):
                found["license_link"] = link
    return found


def _is_license(value: Any) -> bool:
    return isinstance(value, str) and _LICENSE.fullmatch(value) is not None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no JSON file: {error}") from error


def render_card(data: PruningCardData, old: str | None = None) -> str:
    """The text of ``README.md``.

    Args:
        data: The facts.
        old: The card so far. What its author wrote outside of our marks stays, and so does metadata that is not ours.

    Raises:
        DataError: If metadata is not as the Hub wants it.
    """
    metadata, body = _split(old or "")
    merged = {**metadata, **{k: v for k, v in _metadata(data).items() if k not in metadata or k in _OURS}}
    merged["tags"] = list(dict.fromkeys([*(metadata.get("tags") or []), *_metadata(data)["tags"]]))
    text = f"{BEGIN}\n\n{_text(data)}\n{END}"
    if BEGIN in body and END in body:
        before, _, rest = body.partition(BEGIN)
        body = f"{before}{text}{rest.partition(END)[2]}"
    else:
        body = f"{body.rstrip()}\n\n{text}\n".lstrip() if body.strip() else f"{text}\n"
    front = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{front}---\n\n{body.lstrip()}"


_OURS = ("model-index", FACTS)


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and body of a card."""
    match = _FRONT.match(text.replace("\r\n", "\n"))
    if match is None:
        return {}, text
    try:
        metadata = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        raise DataError(f"the metadata of the card so far is no YAML: {error}; mend README.md first") from error
    if not isinstance(metadata, dict):
        raise DataError("the metadata of the card so far is no mapping: mend README.md first")
    return metadata, text.replace("\r\n", "\n")[match.end() :]


def write_card(folder: str | Path, data: PruningCardData) -> str:
    """Write or update ``README.md`` in a folder, at once or not at all; what its author wrote stays.

    Args:
        folder: The folder.
        data: The facts.

    Returns:
        The card.

    Raises:
        DataError: If the metadata of the card so far, or a fact, is not as the Hub wants it.
    """
    path = Path(folder) / "README.md"
    text = render_card(data, path.read_text(encoding="utf-8") if path.is_file() else None)
    write_text(path, text)
    return text


def describe_model(model: Any, folder: str | Path, **more: Any) -> str:
    """Count what is zero in a model, and write the report and the card into the folder that it was saved in.

    Args:
        model: The model.
        folder: Its checkpoint.
        **more: As of :func:`read_card_data`.

    Returns:
        The card.
    """
    report = sparsity_report(model)
    if getattr(getattr(model, "config", None), RECORD, None) is not None:
        report = dataclasses.replace(report, structure=structure_report(model))
    write_json(Path(folder) / "sparsity_report.json", report.to_dict())
    return write_card(folder, read_card_data(folder, **more))


def read_facts(text: str) -> dict[str, Any]:
    """The numbers that a card gives to programs, empty if it has none."""
    facts = _split(text)[0].get(FACTS)
    return facts if isinstance(facts, dict) else {}


# --- metadata ------------------------------------------------------------------------------------------------


def _metadata(data: PruningCardData) -> dict[str, Any]:
    for key in ("license", "license_name"):
        value = getattr(data, key)
        if value is not None and not _is_license(value):
            raise DataError(f"{key} is {value!r}: expected an identifier such as apache-2.0")
    if data.license_link is not None and not _LINK.fullmatch(data.license_link):
        raise DataError(f"license_link is {data.license_link!r}: expected an address, https://…")
    for key in ("base_model", "dataset"):
        if (value := getattr(data, key)) is not None and not is_repo_id(value):
            raise DataError(f"{key} is {value!r}: expected a Hub id, owner/name; the Hub takes no other")
    results = []
    score = (data.evaluation or {}).get("evaluation")
    if score and data.dataset:
        kind, value = ("perplexity", score.get("perplexity")) if data.tokens else ("accuracy", score.get("accuracy"))
        task = "text-generation" if data.tokens else "text-classification"
        results = [
            EvalResult(
                task_type=task,
                dataset_type=data.dataset,
                dataset_name=data.dataset,
                dataset_split=score.get("split") or None,
                metric_type=kind,
                metric_value=value,
            )
        ]
    card = ModelCardData(
        base_model=data.base_model,
        license=data.license,
        license_name=data.license_name,
        license_link=data.license_link,
        datasets=[data.dataset] if data.dataset else None,
        library_name="transformers",
        tags=["pruned", "sparse", "hf_prune"],
        model_name=data.name if results else None,
        eval_results=results or None,
    )
    return {**card.to_dict(), FACTS: _facts(data)}


def _facts(data: PruningCardData) -> dict[str, Any]:
    """What verify compares with the files."""
    report = data.report
    if (structure := report.get("structure")) is not None:  # the rest of the report counts what was taken out since
        facts: dict[str, Any] = {"parameters": structure["parameters"], "files": dict(data.files)}
    else:
        facts = {key: report[key] for key in ("parameters", "nonzero", "target_parameters", "removed")}
        facts |= {"nm_patterns": list(report.get("nm_patterns") or []), "files": dict(data.files)}
    if (score := (data.evaluation or {}).get("evaluation")) is not None:
        keys = ("accuracy", "perplexity", "n", "split", "data_fingerprint")
        facts["score"] = {key: score[key] for key in keys if score.get(key) is not None}
    return facts


# --- text ------------------------------------------------------------------------------------------------------


def _text(data: PruningCardData) -> str:
    report = data.report
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = importlib.resources.files("hf_prune").joinpath("templates/model_card.md").read_text(encoding="utf-8")
    structure = report.get("structure")
    size = {
        "parameters": f"{(structure or report)['parameters']:,}",
        "nonzero": f"{report['nonzero']:,}" if structure is None else "",
        "memory": f"{format_count((structure or report)['bytes'])}B",
        "disk": f"{format_count(sum(data.files.values()))}B",
        "before": f"{structure['parameters_before']:,}" if structure else None,
    }
    text = environment.from_string(template).render(
        name=_plain(data.name),
        model_class=_plain(report["model"]),
        base_model=data.base_model,
        what=_what(data),
        scores=_scores(data),
        size=size,
        speed=_speed(data),
        layers=_layers(report),
        pictures=[{"file": name, "text": _plain(text)} for name, text in data.pictures.items()],
        loading=_loading(data),
        made=_made(data),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _plain(text: str) -> str:
    """Text from outside, which must not become markup or break a table."""
    return html.escape(" ".join(str(text).split()), quote=False).replace("|", "&#124;").replace("`", "&#96;")


def _what(data: PruningCardData) -> list[str]:
    report, config = data.report, data.config
    lines = []
    if report.get("structure"):
        now, before = report["structure"]["parameters"], report["structure"]["parameters_before"]
        lines.append(f"Whole units were taken out: {now:,} of {before:,} parameters are left ({_share(now, before)}).")
    elif report["removed"]:
        lines.append(
            f"{report['removed']:,} of the {report['target_parameters']:,} weights that were pruned are zero "
            f"({_share(report['removed'], report['target_parameters'])}); of all parameters "
            f"{_share(report['parameters'] - report['nonzero'], report['parameters'])} are."
        )
    if report.get("nm_patterns"):
        lines.append(f"Every pruned matrix has the pattern {', '.join(report['nm_patterns'])}.")
    if config is not None:
        lines.append(_method(config))
    if report.get("polish"):
        lines.append("Afterwards what is left was trained for a short while to put out what the dense model does.")
    if data.training is not None:
        lines.append(f"It was pruned while it was trained, for {data.training['steps']:,} steps.")
    return lines


def _method(config: PruningConfig) -> str:
    if config.removes_units:
        paper = UNIT_CRITERIA_OF[config.criterion][2]
        what = f"{' and '.join(config.granularity)}s"
    else:
        paper = CRITERIA.get(config.criterion).paper
        granularity = parse_granularity(config.granularity)
        what = f"granularity {granularity.spec} ({granularity.paper})"
    parts = [f"Criterion {config.criterion} ({paper})", what, f"scope {config.scope}"]
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
    where = _plain(f"{data.dataset or Path(str(score.get('source', ''))).name or 'its data'}")
    if "accuracy" not in score:
        rows = [["this model", f"{score['perplexity']:.3f}"]]
        if dense is not None:
            rows.append(["dense", f"{dense['perplexity']:.3f}"])
        return {
            "names": ["perplexity"],
            "rows": rows,
            "note": f"Measured on {where}, {score.get('tokens', 0):,} tokens.",
        }
    rows = [["this model", *_accuracy(score)]]
    if dense is not None:
        rows.append(["dense", *_accuracy(dense)])
    note = f"Measured on {where}, {_plain(score.get('split') or 'all of it')}; ± is one standard error."
    if comparison is not None:
        low, high = comparison["interval"]
        note += (
            f" On the same examples the drop is {comparison['drop']:.2f} points ({100 * comparison['confidence']:g} % "
            f"interval {low:.2f} to {high:.2f}); McNemar's exact p = {comparison['p_value']:.3g}."
        )
    return {"names": ["accuracy", "n"], "rows": rows, "note": note}


def _accuracy(score: Mapping[str, Any]) -> list[str]:
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
            f"Timed in turns, {how['rounds']} rounds, {how['threads']} thread(s), {how['dtype']}, {how['device']}, "
            f"torch {how['torch']}."
        )
        return "\n".join(lines)
    if (speed := structure.get("speed")) is not None:
        return (
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
                _share(gone, site["before"]),
            ]
            for site in structure["sites"]
            if (gone := site["before"] - site["units"]) >= 0
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
