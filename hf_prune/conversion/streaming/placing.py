"""Move a finished stream into its output folder, and finish a move that was interrupted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_prune.checkpoint.staging import essential_files, finish_checkpoint
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.evaluation.sparsity_report import SparsityReport, TensorReport
from hf_prune.evaluation.structure_report import structure_from_dict
from hf_prune.evaluation.weight_statistics import WeightStatistics, nm_patterns
from hf_prune.kernels.matrix import Target
from hf_prune.planning.config import PruningConfig
from hf_prune.utils.output_folder import check_output
from hf_prune.utils.staging import place_folder, put_back

COMMAND = "prune"


def report_entry(
    name: str,
    shape: tuple[int, ...],
    itemsize: int,
    config: PruningConfig,
    target: Target | None,
    weight: Tensor | None,
    nonzero: int = 0,
) -> dict[str, Any]:
    """What the report says of a parameter, as the journal keeps it.

    Args:
        name: Its name.
        shape: Its shape.
        itemsize: Bytes of each number in a loaded model.
        config: The settings that it was pruned by.
        target: The target that it is; None for none.
        weight: Its values, of those that pruning covers.
        nonzero: Of the others, how many numbers are not zero.
    """
    return dataclasses.asdict(
        TensorReport(
            name=name,
            shape=shape,
            is_target=weight is not None,
            parameters=math.prod(shape),
            nonzero=nonzero if weight is None else int(weight.count_nonzero()),
            nm_patterns=() if target is None or weight is None else nm_patterns(target, weight, config),
            bytes=math.prod(shape) * itemsize,
            after=None if weight is None else WeightStatistics.of(weight),
        )
    )


def report_of(
    model_name: str,
    names: Sequence[str],
    reports: Mapping[str, Mapping[str, Any]],
    notes: Sequence[str],
    structure: Mapping[str, Any] | None = None,
) -> SparsityReport:
    """The sparsity report, from the entries of all parameters in the journal.

    Args:
        model_name: The model's class.
        names: Of its parameters.
        reports: As :func:`report_entry` makes them.
        notes: Sentences of the plan.
        structure: The report of what is left of a shrunk model, as a dict.
    """

    def statistics(values: Mapping[str, float] | None) -> WeightStatistics | None:
        return None if values is None else WeightStatistics(**values)

    return SparsityReport(
        model_name,
        tuple(
            TensorReport(
                **{
                    **(values := reports[name]),
                    "shape": tuple(values["shape"]),
                    "nm_patterns": tuple(values["nm_patterns"]),
                    "after": statistics(values["after"]),
                    "before": statistics(values["before"]),
                }
            )
            for name in names
        ),
        structure=None if structure is None else structure_from_dict(structure),
        notes=tuple(notes),
    )


def place_output(journal: Journal, out: Path, names: Sequence[str], report: SparsityReport, overwrite: bool) -> None:
    """Move a finished checkpoint into its folder; the journal records the move first, so that it can be continued."""
    removed = finish_checkpoint(journal.staging, out, COMMAND)
    summary: dict[str, Any] = {"names": list(names), "model": report.model_name, "notes": list(report.notes)}
    if report.structure is not None:
        summary["structure"] = report.structure.to_dict()
    stat = journal.staging.stat()
    staged = {"folder": [stat.st_dev, stat.st_ino], "files": [name for name, *_ in _list_files(journal.staging)]}
    journal.add({"placing": removed, "found": _list_files(out), **staged, **summary})
    finish_placing(journal, out, overwrite)


def _list_files(folder: Path) -> list[list[Any]]:
    """Names, sizes and times of a folder's files."""
    files = [(path.relative_to(folder).as_posix(), path.lstat()) for path in folder.rglob("*") if not path.is_dir()]
    return sorted([name, stat.st_size, stat.st_mtime_ns] for name, stat in files)


def is_placing(journal: Journal) -> bool:
    """Whether :func:`place_output` was interrupted."""
    return bool(journal.records) and journal.records[-1].keys() >= {"placing", "found", "folder", "files", "names"}


def finish_placing(journal: Journal, out: Path, overwrite: bool) -> SparsityReport:
    """Finish the move that :func:`place_output` began, however far it came, and return the report.

    Raises:
        CheckpointError: If other files appeared in the output folder in the meantime.
    """
    last = journal.records[-1]
    stat = out.stat() if out.exists() else None
    # After an exchange of the folders, the output is the former staging folder.
    placed = stat is not None and [stat.st_dev, stat.st_ino] == last["folder"]
    placed = placed or put_back(journal.staging, journal.out)
    # If files are missing in staging, the move was done and the journal's folder was being deleted.
    if not placed and all((journal.staging / name).is_file() for name in last["files"]):
        if _list_files(out) != last["found"]:
            check_output(out, COMMAND, overwrite=overwrite)
        place_folder(journal.staging, journal.out, last["placing"], essential_files())
    reports: dict[str, dict[str, Any]] = {}
    for record in journal.records:
        reports |= record.get("tensors", {})
    journal.remove()
    return report_of(last["model"], last["names"], reports, last.get("notes", ()), last.get("structure"))
