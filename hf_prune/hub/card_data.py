"""The facts that a model card is rendered from: read from a checkpoint's files, and from what was measured."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hf_prune.checkpoint.files import CARD_DATA, REPORTS
from hf_prune.errors import CheckpointError, DataError, HfPruneError
from hf_prune.evaluation.generation_result import PER_PROMPT
from hf_prune.hub.checksums import BESIDE, PICTURES, checksums, differing, weights_digest
from hf_prune.hub.folder_facts import counted_facts
from hf_prune.hub.licenses import LICENSE_FIELDS, inherited_license
from hf_prune.hub.measurements import MEASURED, read_measurement
from hf_prune.hub.plausibility import BESIDE_SCORES, CHECKS, check_fact
from hf_prune.planning.config import PruningConfig
from hf_prune.utils.files import read_text
from hf_prune.utils.folders import RUN_FILE
from hf_prune.utils.formatting import display_name
from hf_prune.utils.front_matter import read_yaml
from hf_prune.utils.json_files import read_json_object

# What a card keeps from an earlier card of the same files, whatever else is counted again.
KEPT = ("base_model", "dataset", "language", "calibration", "example", "command", *MEASURED)
# Fields of scores with an entry for each example: too long for a card.
_PER_EXAMPLE = ("predictions", "labels", "distributions", "values", "references", "kept", *PER_PROMPT, "by_example")
_SCORES = {"evaluation": ("evaluation", "dense"), "training": ("dense", "pruned")}


@dataclass(frozen=True)
class PruningCardData:
    """The facts of a model card. What is None does not appear in the card.

    Args:
        name: The model's name.
        report: The content of ``sparsity_report.json``.
        files: Size in bytes of each weight file, by name.
        checksums: SHA-256 of the checkpoint's files, by name.
        config: The pruning settings.
        evaluation: The output of ``hf-prune evaluate --json``, with or without ``--against``.
        latency: The output of ``hf-prune bench --json``, the dense model first.
        acceleration: The output of ``hf-prune accelerate --json``.
        training: The content of ``training_report.json``.
        base_model: Hub id of the dense model.
        dataset: Hub id of the data that the scores were measured on.
        license: Identifier of the license, normally that of the base model.
        license_name: Name of a license whose identifier is ``"other"``.
        license_link: Where that license can be read.
        language: What the model reads, such as ``en``, by its code.
        calibration: The data that pruning learned from, in words.
        example: An ``"input"`` and the ``"output"`` that a pipeline gave for it, as it was printed.
        labels: The classes that a classifier tells apart, separated by commas.
        command: The command that made the checkpoint.
        needs_plugin: Whether it loads only after ``import hf_prune``.
        remote_code: Whether it also loads without hf_prune, with ``trust_remote_code=True``.
        pictures: Caption of each picture, by file name.
        tokens: Whether it is a language model.
        sentences: The class of sentence-transformers that loads it; empty for one of transformers.
        rounded: Whether the remaining values were rounded when they were saved.
        versions: Versions of the packages that made it, by name.
    """

    name: str
    report: Mapping[str, Any]
    files: Mapping[str, int]
    checksums: Mapping[str, str] = field(default_factory=dict)
    config: PruningConfig | None = None
    evaluation: Mapping[str, Any] | None = None
    latency: Mapping[str, Any] | None = None
    acceleration: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    base_model: str | None = None
    dataset: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | None = None
    calibration: str | None = None
    example: Mapping[str, str] | None = None
    labels: str = ""
    command: str | None = None
    needs_plugin: bool = False
    remote_code: bool = False
    pictures: Mapping[str, str] = field(default_factory=dict)
    tokens: bool = False
    sentences: str = ""
    rounded: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse facts that cannot be true.

        Raises:
            DataError: If a number is missing, out of range, or contradicts another one.
        """
        for name, hint in get_type_hints(type(self)).items():
            if not _has_type(value := getattr(self, name), hint):
                raise DataError(f"the {name} of a card is {value!r:.100}: expected {_type_name(hint)}")
        for name in CHECKS:
            if (value := getattr(self, name)) is not None:
                check_fact(name, value, f"the {name} of a card")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the predictions for single examples."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["config"] = None if self.config is None else self.config.to_dict()
        for kind, parts in _SCORES.items():
            if values[kind] is not None:
                values[kind] = _without_examples_in(values[kind], parts)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruningCardData:
        """The inverse of :meth:`to_dict`."""
        config = values.get("config")
        return cls(**{**values, "config": None if config is None else PruningConfig.from_dict(config)})


def read_card_data(folder: str | Path, **more: Any) -> PruningCardData:
    """Read the facts of a card from the files of a checkpoint.

    The base model, data, license, command, scores and timings of an earlier card of the same files are kept unless
    ``more`` replaces them.

    Args:
        folder: A folder that ``hf-prune prune`` or ``train`` wrote.
        **more: Other fields of :class:`PruningCardData`. ``evaluation``, ``latency`` and ``acceleration`` may be paths
            of JSON files. If no license is given, that of ``base_model`` is taken; a folder as ``base_model`` gives
            only its license.

    Raises:
        CheckpointError: If neither the folder nor ``more`` has a report.
        DataError: If a file is not valid JSON, or has other content than expected.
    """
    folder = Path(folder)
    facts = _read_reports(folder, more.get("report")) | counted_facts(folder)
    facts["pictures"] = {name: text for name, text in PICTURES.items() if (folder / name).is_file()}
    facts["name"] = folder.resolve().name
    facts["versions"] = {name: importlib.metadata.version(name) for name in ("hf_prune", "torch", "transformers")}
    if (old := stored_card_data(folder, facts["checksums"])) is not None:
        keys = [*KEPT, "versions", "name", *(() if more.get("base_model") else LICENSE_FIELDS)]
        facts |= {key: value for key in keys if (value := getattr(old, key)) is not None}
    for key, value in more.items():
        if key in MEASURED and value is not None:
            facts[key] = read_measurement(key, value, weights_digest(facts["checksums"]), folder)
        elif value is not None:
            facts[key] = value
    config = facts.get("config")
    if "calibration" not in facts and config is not None and config.needs_data and (seen := _data_of_run(folder)):
        facts["calibration"] = seen
    if (base := facts.get("base_model")) is not None:
        if "license" not in facts:
            facts |= inherited_license(base)
        if Path(base).is_dir():  # not a Hub id, so the card cannot name it
            del facts["base_model"]
    return PruningCardData(**facts)


def _data_of_run(folder: Path) -> str | None:
    """The data that a run of the command line learned from, as its settings say; None if they do not."""
    path = folder / RUN_FILE
    settings = (read_yaml(read_text(path), str(path), "delete it") or {}) if path.is_file() else {}
    if not isinstance(settings, dict) or not isinstance(source := settings.get("data"), str):
        return None
    number, split = settings.get("calibration_samples"), settings.get("calibration_split")
    where = f"{display_name(source)}, {split}" if split else display_name(source)
    return f"up to {number} samples of {where}" if number else where


def _read_reports(folder: Path, report: Mapping[str, Any] | None) -> dict[str, Any]:
    """The reports of a folder, by field; a training report only if it is about the weights of ``report``."""
    path, training = (folder / name for name in REPORTS)
    trained = read_json_object(training, DataError) if training.is_file() else None
    if trained is not None:
        check_fact("training", trained, str(training))
    if trained is not None and (report is None or _counts(trained["sparsity"]) == _counts(report)):
        evaluation = {"evaluation": trained["pruned"], **{key: trained[key] for key in ("dense", "comparison")}}
        return {"training": trained, "report": trained["sparsity"], "evaluation": evaluation}
    if report is None and not path.is_file():
        raise CheckpointError(
            f"{folder} has neither sparsity_report.json nor training_report.json: expected a folder that hf-prune "
            f"prune or train wrote, whose numbers were counted"
        )
    if report is None:
        check_fact("report", report := read_json_object(path, DataError), str(path))
    return {"report": report}


def _counts(report: Mapping[str, Any]) -> tuple[Any, ...]:
    if (structure := report.get("structure")) is not None:  # the other numbers are of the model before shrinking
        return (structure["parameters"],)
    return report["parameters"], report["nonzero"]


def with_counted_facts(
    data: PruningCardData, counted: Mapping[str, Any], report: Mapping[str, Any] | None = None
) -> PruningCardData:
    """Replace every stored fact that can be counted by what was counted now.

    Args:
        data: The stored facts.
        counted: What :func:`counted_facts` returned.
        report: The report counted from the model; None keeps the stored one.
    """
    sums = counted["checksums"]
    pictures = {name: text for name, text in PICTURES.items() if name in data.pictures and name in sums}
    if report is None:
        report = data.report
    else:
        report = {**report, "polish": data.report.get("polish") or report["polish"]}
    facts = {
        **counted,
        "rounded": data.rounded or counted["rounded"],
        "checksums": {name: digest for name, digest in sums.items() if name in data.checksums},
    }
    return dataclasses.replace(data, **facts, report=report, pictures=pictures)


def with_reports(data: PruningCardData, folder: Path) -> PruningCardData:
    """The same facts with the checksums of the reports and pictures that are in the folder now."""
    others = {name: digest for name, digest in data.checksums.items() if name not in BESIDE}
    return dataclasses.replace(data, checksums={**others, **checksums(folder, BESIDE)})


def is_score_of_training(data: PruningCardData) -> bool:
    """Whether the scores are those at the end of the training, which need no digest of the weights."""
    if data.training is None or data.evaluation is None:
        return False
    return _without_examples(data.evaluation["evaluation"]) == _without_examples(data.training["pruned"])


def load_card_data(folder: Path) -> PruningCardData:
    """Read ``pruning_card.json``, the facts that the card in a folder was rendered from.

    Raises:
        DataError: If it is missing, not valid JSON, or cannot be true.
    """
    path = folder / CARD_DATA
    if not path.is_file():
        raise DataError(f"{path} is missing: write it with hf-prune card {folder} --write")
    values = read_json_object(path, DataError)
    try:
        return PruningCardData.from_dict(values)
    except (HfPruneError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path} does not hold the facts of a card: {error}") from error


def stored_card_data(folder: Path, sums: Mapping[str, str] | None = None) -> PruningCardData | None:
    """Like :func:`load_card_data`, but None if the file is missing, damaged, or about other files.

    Args:
        folder: A checkpoint.
        sums: Its :func:`checksums`, if they are known.
    """
    try:
        data = load_card_data(folder)
    except HfPruneError:
        return None
    changed = set(differing(data.checksums, checksums(folder) if sums is None else sums))
    return None if changed - set(BESIDE) else data


def _without_examples_in(scores: Mapping[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """Scores, comparisons, and what else was measured beside them, without what is said of single examples."""
    short: dict[str, Any] = {}
    for key, value in scores.items():
        if key in parts and isinstance(value, Mapping):
            value = _without_examples(value)
        elif key in BESIDE_SCORES and isinstance(value, Mapping):
            value = _without_examples_in(value, parts)
        short[key] = value
    return short


def _without_examples(score: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in score.items() if key not in _PER_EXAMPLE}


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a value has a type, one type of a union, or is a mapping with values of a type."""
    if isinstance(hint, UnionType):
        return any(_has_type(value, choice) for choice in get_args(hint))
    inner = get_args(hint)
    right = isinstance(value, get_origin(hint) or hint)
    return right and (not inner or inner[1] is Any or all(isinstance(item, inner[1]) for item in value.values()))


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("collections.abc.", "")
