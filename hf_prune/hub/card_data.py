"""What a model card is made of: facts read from the files of a checkpoint, and from what was measured."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hf_prune.checkpoint.files import CARD_DATA, MASK_FILE, REPORTS
from hf_prune.checkpoint.mask_file import StoredMasks, read_pruning
from hf_prune.checkpoint.packed.files import INDEX, SINGLE, file_paths
from hf_prune.checkpoint.packed.format import is_packed, unseal
from hf_prune.checkpoint.packed.quantization_config import is_ours
from hf_prune.errors import CheckpointError, DataError, HfPruneError
from hf_prune.hub.card_checks import check_evaluation, check_latency, check_report, check_sizes, check_training
from hf_prune.hub.checksums import BESIDE, PICTURES, checksums, differing, weights_digest
from hf_prune.hub.licenses import LICENSE_FIELDS, inherited_license
from hf_prune.planning.config import PruningConfig
from hf_prune.structured.shrink_record import RECORD
from hf_prune.utils.json_files import read_config, read_json_object

KEPT = ("base_model", "dataset", "command", "evaluation", "latency")  # of the same files, whatever else is made anew
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

    def __post_init__(self) -> None:
        """Refuse what cannot be true.

        Raises:
            DataError: If a number is out of range, contradicts another one, or is missing.
        """
        for name, hint in get_type_hints(type(self)).items():
            if not _is_of(value := getattr(self, name), hint):
                raise DataError(f"the {name} of a card is {value!r:.100}: expected {_spelled(hint)}")
        for name, check in _CHECKS.items():
            if (value := getattr(self, name)) is not None:
                _check(check, value, f"the {name} of a card")

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
    found = _reports(folder, more.get("report")) | counted_facts(folder)
    found["pictures"] = {name: text for name, text in PICTURES.items() if (folder / name).is_file()}
    found["name"] = folder.resolve().name
    found["versions"] = {name: importlib.metadata.version(name) for name in ("hf_prune", "torch", "transformers")}
    if (old := stored_card_data(folder, found["checksums"])) is not None:
        keys = [*KEPT, "versions", "name", *(() if more.get("base_model") else LICENSE_FIELDS)]
        found |= {key: value for key in keys if (value := getattr(old, key)) is not None}
    for key, value in more.items():
        if key in _MEASURED and value is not None:
            found[key] = _measured(key, value, weights_digest(found["checksums"]), folder)
        elif value is not None:
            found[key] = value
    if (base := found.get("base_model")) is not None:
        if "license" not in found:
            found |= inherited_license(base)
        if Path(base).is_dir():  # and no Hub id
            del found["base_model"]
    return PruningCardData(**found)


def counted_facts(folder: Path) -> dict[str, Any]:
    """The fields of :class:`PruningCardData` that a checkpoint's files tell by themselves, reports apart.

    Raises:
        CheckpointError: If they are damaged.
        DataError: If ``config.json`` is no JSON.
    """
    found: dict[str, Any] = {"rounded": False, "config": None}
    config = read_config(folder / "config.json", DataError)
    masks = folder / MASK_FILE
    settings = (config.get(RECORD) or {}).get("pruning_config")
    weights = _first_file(folder)
    if weights is not None and is_packed(weights):
        described = unseal(weights)
        found["config"], _ = read_pruning(described.get("pruning", {}), weights)
        found["rounded"] = _rounds(described)
    elif masks.is_file():
        found["config"] = StoredMasks(masks).config
    if found.get("config") is None and settings is not None:
        found["config"] = PruningConfig.from_dict(settings)
    found["needs_plugin"] = (config.get("quantization_config") or {}).get("quant_method") == "hf_prune"
    found["remote_code"] = is_ours(config.get("auto_map"))
    found["files"] = {p.name: p.stat().st_size for p in sorted(folder.glob("*.safetensors"))}
    found["checksums"] = checksums(folder)
    found["tokens"] = any(name.endswith("ForCausalLM") for name in config.get("architectures") or [])
    return found


def _reports(folder: Path, report: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the reports in a folder say; of a training if it is one on the same weights."""
    path, training = (folder / name for name in REPORTS)
    trained = read_json_object(training, DataError) if training.is_file() else None
    if trained is not None:
        _check(check_training, trained, str(training))
    if trained is not None and (report is None or _counts(trained["sparsity"]) == _counts(report)):
        evaluation = {"evaluation": trained["pruned"], **{key: trained[key] for key in ("dense", "comparison")}}
        return {"training": trained, "report": trained["sparsity"], "evaluation": evaluation}
    if report is None and not path.is_file():
        raise CheckpointError(
            f"{folder} has neither sparsity_report.json nor training_report.json: expected a folder that hf-prune "
            f"prune or train wrote, whose numbers were counted"
        )
    if report is None:
        _check(check_report, report := read_json_object(path, DataError), str(path))
    return {"report": report}


def _counts(report: Mapping[str, Any]) -> tuple[Any, ...]:
    if (structure := report.get("structure")) is not None:  # the rest of the report is of the larger model
        return (structure["parameters"],)
    return report["parameters"], report["nonzero"]


def _measured(key: str, value: Any, weights: str | None, folder: Path) -> dict[str, Any]:
    """What was measured, if it is what we know how to show, and of these weights: a file must say of which."""
    found = read_json_object(value, DataError) if isinstance(value, str | Path) else value
    inner, command = _MEASURED[key]
    part = found.get(inner) if isinstance(found, Mapping) else None
    if key == "evaluation" and isinstance(part, Mapping):
        wanted = ("perplexity",) if "perplexity" in part else ("accuracy", "standard_error", "n")
        right = all(isinstance(part.get(name), int | float) for name in wanted)
    else:
        right = key == "latency" and isinstance(part, list)
    where = value if isinstance(value, str | Path) else f"{key}={str(value)[:60]}"
    if not right:
        raise DataError(f"{where} is not what {command} --json printed: it has no {inner!r} with its numbers")
    _check(_CHECKS[key], found, str(where))
    measured = measured_of(found)
    if weights is not None and weights not in measured and (measured or isinstance(value, str | Path)):
        which = "are others than those" if measured else "are not said to be those"
        raise DataError(f"the weights that {where} is about {which} of {folder}: run {command} again, on this folder")
    return dict(found)


def recounted(
    data: PruningCardData, files: Mapping[str, Any], report: Mapping[str, Any] | None = None
) -> PruningCardData:
    """The facts with everything that the files tell in place of what was stored.

    Args:
        data: The facts.
        files: As of :func:`counted_facts`.
        report: What was counted in the model; None leaves what was stored.
    """
    there = {name: text for name, text in PICTURES.items() if name in data.pictures and name in files["checksums"]}
    sums = {name: each for name, each in files["checksums"].items() if name in data.checksums}
    counts = data.report if report is None else {**report, "polish": data.report.get("polish") or report["polish"]}
    return dataclasses.replace(
        data,
        **{**files, "rounded": data.rounded or files["rounded"], "checksums": sums},
        report=counts,
        pictures=there,
    )


def is_of_training(data: PruningCardData, name: str) -> bool:
    """Whether scores are those that a training ended with, which says so without a digest of the weights."""
    training = data.training
    if name != "evaluation" or training is None or data.evaluation is None:
        return False
    said, trained = (
        {k: v for k, v in each.items() if k not in ("predictions", "labels")}
        for each in (data.evaluation["evaluation"], training["pruned"])
    )
    return said == trained


def measured_of(found: Mapping[str, Any]) -> list[str]:
    """The digests of the weights that scores or timings are said to be of; of timings not that of the dense model."""
    said = found.get("weights")
    if "points" not in found:
        return [said] if isinstance(said, str) else []
    if not isinstance(said, Mapping):
        return []
    names = list(dict.fromkeys(point["model"] for point in found["points"]))
    return [each for name in names[len(names) > 1 :] if isinstance(each := said.get(name), str)]


_CHECKS = {
    "report": check_report,
    "files": check_sizes,
    "evaluation": check_evaluation,
    "latency": check_latency,
    "training": check_training,
}


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, one of several, or a mapping to values of a type."""
    if isinstance(hint, UnionType):
        return any(_is_of(value, each) for each in get_args(hint))
    inner = get_args(hint)
    right = isinstance(value, get_origin(hint) or hint)
    return right and (not inner or inner[1] is Any or all(isinstance(each, inner[1]) for each in value.values()))


def _spelled(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("collections.abc.", "")


def _check(check: Callable[[Mapping[str, Any]], None], value: Any, where: str) -> None:
    try:
        check(value)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        what = error if isinstance(error, DataError) else f"not as hf_prune writes it: {error!r}"
        raise DataError(f"{where} cannot be true: {what}") from error


def load_card_data(folder: Path) -> PruningCardData:
    """What the card in a folder says that it was rendered from.

    Raises:
        DataError: If that is not there, no JSON, or cannot be true.
    """
    path = folder / CARD_DATA
    if not path.is_file():
        raise DataError(f"{path} is no JSON file: it is not there")
    values = read_json_object(path, DataError)
    try:
        return PruningCardData.from_dict(values)
    except (HfPruneError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not what a card is rendered from: {error}") from error


def stored_card_data(folder: Path, sums: Mapping[str, str] | None = None) -> PruningCardData | None:
    """What the card in a folder was rendered from; None if that is not there, damaged, or not of these files.

    Args:
        folder: A checkpoint.
        sums: Its :func:`checksums`, if they are known.
    """
    try:
        data = load_card_data(folder)
    except HfPruneError:
        return None
    others = set(differing(data.checksums, checksums(folder) if sums is None else sums))
    return None if others - set(BESIDE) else data


def has_report(folder: Path) -> bool:
    """Whether a folder has what a card can be made of."""
    return any((folder / name).is_file() for name in REPORTS)


def is_rounded(folder: Path) -> bool:
    """Whether a checkpoint was written with ``values="int8"``.

    Raises:
        CheckpointError: If it is damaged.
    """
    first = _first_file(folder)
    return first is not None and is_packed(first) and _rounds(unseal(first))


def _first_file(folder: Path) -> Path | None:
    """The file of weights that is loaded, or the first of several; of a variant where there is nothing else."""
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return file_paths(folder)[0][0]
    return next(iter(sorted(folder.glob("model*.safetensors"))), None)


def _rounds(described: Mapping[str, Any]) -> bool:
    return bool(described.get("values", "exact") != "exact")


def with_reports(data: PruningCardData, folder: Path) -> PruningCardData:
    """The same facts with the checksums of the reports and pictures that lie in a folder now."""
    rest = {name: found for name, found in data.checksums.items() if name not in BESIDE}
    return dataclasses.replace(data, checksums={**rest, **checksums(folder, BESIDE)})
