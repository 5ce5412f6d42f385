"""What a model card is made of: facts read from the files of a checkpoint, and from what was measured."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_prune.checkpoint import CARD_DATA, MASK_FILE, REPORTS, StoredMasks, read_pruning
from hf_prune.config import PruningConfig
from hf_prune.errors import CheckpointError, DataError, HfPruneError
from hf_prune.files import read_text
from hf_prune.front_matter import split_card
from hf_prune.hub import card_of_base
from hf_prune.packed_format import is_packed, unseal
from hf_prune.shards import CHUNK_BYTES
from hf_prune.shrinking import RECORD
from hf_prune.structure import is_ours

PICTURES = {"layers.png": "Sparsity by layer", "weights.png": "Histogram of the weights"}
_LICENSE = re.compile(r"[\w.-]+")
_LINK = re.compile(r"https?://[^\s<>\"'`]+")
KEPT = ("base_model", "dataset", "command", "evaluation", "latency")  # of the same files, whatever else is made anew
LICENSE_FIELDS = ("license", "license_name", "license_link")
_DESCRIBED = ("*.safetensors", "*.safetensors.index.json", "config.json", "*.py")
_MEASURED = {"evaluation": ("evaluation", "hf-prune evaluate"), "latency": ("points", "hf-prune bench")}


@dataclass(frozen=True)
class PruningCardData:
    """What a card is made of; what is None is left out of it.

    Args:
        name: What the model is called.
        report: What ``sparsity_report.json`` says.
        files: Sizes in bytes of the checkpoint's files, by name.
        checksums: SHA-256 of files, by name.
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
        rounded: Whether the values that pruning left were rounded as they were written.
        versions: Of the packages that made it, by name.
    """

    name: str
    report: Mapping[str, Any]
    files: Mapping[str, int]
    checksums: Mapping[str, str] = field(default_factory=dict)
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
    rounded: bool = False
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

    What an earlier card of the same files said of base model, data, license, command, scores and timings stays if
    ``more`` does not say otherwise.

    Args:
        folder: A folder that ``hf-prune prune`` or ``train`` wrote.
        **more: Other fields of :class:`PruningCardData`; ``evaluation`` and ``latency`` may be paths of JSON files. A
            ``base_model`` lends its license if none is given; it may be a folder too, which lends nothing else.

    Raises:
        CheckpointError: If the folder has no report, and ``more`` neither.
        DataError: If a file is no JSON, or not what it should be.
    """
    folder = Path(folder)
    found = _reports(folder, more.get("report"))
    config = _read(folder / "config.json")
    masks = folder / MASK_FILE
    settings = (config.get(RECORD) or {}).get("pruning_config")
    weights = next(iter(sorted(folder.glob("model*.safetensors"))), None)
    if weights is not None and is_packed(weights):
        described = unseal(weights)
        found["config"], _ = read_pruning(described.get("pruning", {}), weights)
        found["rounded"] = _rounds(described)
    elif masks.is_file():
        found["config"] = StoredMasks(masks).config
    if found.get("config") is None and settings is not None:
        found["config"] = PruningConfig.from_dict(settings)
    found["needs_plugin"] = config.get("quantization_config", {}).get("quant_method") == "hf_prune"
    found["remote_code"] = is_ours(config.get("auto_map"))
    found["files"] = {p.name: p.stat().st_size for p in sorted(folder.glob("*.safetensors"))}
    found["checksums"] = checksums(folder)
    found["pictures"] = {name: text for name, text in PICTURES.items() if (folder / name).is_file()}
    found["tokens"] = any(name.endswith("ForCausalLM") for name in config.get("architectures") or [])
    found["name"] = folder.resolve().name
    found["versions"] = {name: importlib.metadata.version(name) for name in ("hf_prune", "torch", "transformers")}
    if (old := stored_card_data(folder, found["checksums"])) is not None:
        keys = [*KEPT, "versions", "name", *(() if more.get("base_model") else LICENSE_FIELDS)]
        found |= {key: value for key in keys if (value := getattr(old, key)) is not None}
    for key, value in more.items():
        if key in _MEASURED and value is not None:
            found[key] = _measured(key, value)
        elif value is not None:
            found[key] = value
    if (base := found.get("base_model")) is not None:
        if "license" not in found:
            found |= inherited_license(base)
        if Path(base).is_dir():  # and no Hub id
            del found["base_model"]
    return PruningCardData(**found)


def _reports(folder: Path, report: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the reports in a folder say; of a training if it is one on the same weights."""
    path, training = (folder / name for name in REPORTS)
    trained = _read(training) if training.is_file() else None
    if trained is not None and (report is None or _counts(trained["sparsity"]) == _counts(report)):
        evaluation = {"evaluation": trained["pruned"], **{key: trained[key] for key in ("dense", "comparison")}}
        return {"training": trained, "report": trained["sparsity"], "evaluation": evaluation}
    if report is None and not path.is_file():
        raise CheckpointError(
            f"{folder} has neither sparsity_report.json nor training_report.json: expected a folder that hf-prune "
            f"prune or train wrote, whose numbers were counted"
        )
    return {"report": report or _read(path)}


def _counts(report: Mapping[str, Any]) -> tuple[Any, ...]:
    if (structure := report.get("structure")) is not None:  # the rest of the report is of the larger model
        return (structure["parameters"],)
    return report["parameters"], report["nonzero"]


def _measured(key: str, value: Any) -> dict[str, Any]:
    """What was measured, if it is what we know how to show."""
    found = _read(Path(value)) if isinstance(value, str | Path) else value
    inner, command = _MEASURED[key]
    part = found.get(inner) if isinstance(found, Mapping) else None
    if key == "evaluation" and isinstance(part, Mapping):
        wanted = ("perplexity",) if "perplexity" in part else ("accuracy", "standard_error", "n")
        right = all(isinstance(part.get(name), int | float) for name in wanted)
    else:
        right = key == "latency" and isinstance(part, list)
    if not right:
        where = value if isinstance(value, str | Path) else f"{key}={str(value)[:60]}"
        raise DataError(f"{where} is not what {command} --json printed: it has no {inner!r} with its numbers")
    return dict(found)


def stored_card_data(folder: Path, sums: Mapping[str, str] | None = None) -> PruningCardData | None:
    """What the card in a folder was rendered from; None if that is not there, damaged, or not of these files.

    Args:
        folder: A checkpoint.
        sums: Its :func:`checksums`, if they are known.
    """
    try:
        data = PruningCardData.from_dict(json.loads(read_text(folder / CARD_DATA)))
    except (HfPruneError, OSError, AttributeError, TypeError, ValueError):
        return None
    return data if dict(data.checksums) == (checksums(folder) if sums is None else sums) else None


def has_report(folder: Path) -> bool:
    """Whether a folder has what a card can be made of."""
    return any((folder / name).is_file() for name in REPORTS)


def is_rounded(folder: Path) -> bool:
    """Whether a checkpoint was written with ``values="int8"``.

    Raises:
        CheckpointError: If it is damaged.
    """
    first = next(iter(sorted(folder.glob("model*.safetensors"))), None)
    return first is not None and is_packed(first) and _rounds(unseal(first))


def _rounds(described: Mapping[str, Any]) -> bool:
    return bool(described.get("values", "exact") != "exact")


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's weights, masks, config, index and code, by name."""
    found = {}
    for path in sorted(p for pattern in _DESCRIBED for p in folder.glob(pattern)):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(CHUNK_BYTES):
                digest.update(part)
        found[path.name] = digest.hexdigest()
    return found


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
        metadata = split_card(text or "")[0]
    except DataError:
        return {}
    if not is_license(metadata.get("license")):
        return {}
    found = {"license": metadata["license"]}
    if metadata["license"] == "other":
        if is_license(name := metadata.get("license_name")):
            found["license_name"] = name
        if isinstance(link := metadata.get("license_link"), str):
            if not folder.is_dir() and re.fullmatch(r"[\w.-]+", link):
                link = f"https://huggingface.co/{base_model}/blob/main/{link}"
            if is_link(link):
                found["license_link"] = link
    return found


def is_license(value: Any) -> bool:
    """Whether it can be the identifier of a license."""
    return isinstance(value, str) and _LICENSE.fullmatch(value) is not None


def is_link(value: str) -> bool:
    """Whether it is an address that a card may lead to."""
    return _LINK.fullmatch(value) is not None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no JSON file: {error}") from error
