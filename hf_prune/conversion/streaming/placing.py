"""Put finished files where they belong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_prune.checkpoint.staging import completing, finish_checkpoint
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.evaluation.sparsity_report import SparsityReport, TensorReport
from hf_prune.evaluation.weight_statistics import WeightStatistics
from hf_prune.utils.output_folder import check_output
from hf_prune.utils.staging import place_folder, put_back

COMMAND = "prune"


def report_of(
    model_name: str, names: Sequence[str], reports: Mapping[str, Mapping[str, Any]], notes: Sequence[str]
) -> SparsityReport:
    """A report from what the journal says of each parameter."""

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
        notes=tuple(notes),
    )


def place(partial: Journal, out: Path, names: Sequence[str], report: SparsityReport, overwrite: bool) -> None:
    """Move a finished checkpoint to where it belongs, in such a way that an interruption can be made good."""
    gone = finish_checkpoint(partial.staging, out, COMMAND)
    described = {"names": list(names), "model": report.model_name, "notes": list(report.notes)}
    staged = partial.staging.stat()
    there = {"folder": [staged.st_dev, staged.st_ino], "files": [name for name, *_ in _listed(partial.staging)]}
    partial.add({"placing": gone, "found": _listed(out), **there, **described})
    finish_placing(partial, out, overwrite)


def _listed(folder: Path) -> list[list[Any]]:
    """Names, sizes and times of a folder's files."""
    found = [(path.relative_to(folder).as_posix(), path.lstat()) for path in folder.rglob("*") if not path.is_dir()]
    return sorted([name, stat.st_size, stat.st_mtime_ns] for name, stat in found)


def is_placing(partial: Journal) -> bool:
    """Whether an interruption of :func:`place` left something to finish."""
    return bool(partial.records) and partial.records[-1].keys() >= {"placing", "found", "folder", "files", "names"}


def finish_placing(partial: Journal, out: Path, overwrite: bool) -> SparsityReport:
    """Finish what :func:`place` began; the report of the checkpoint.

    Raises:
        CheckpointError: If something else has got in the way in the meantime.
    """
    last = partial.records[-1]
    there = out.stat() if out.exists() else None
    placed = there is not None and [there.st_dev, there.st_ino] == last["folder"]  # staging is the old one then
    placed = placed or put_back(partial.staging, partial.out)
    if not placed and all((partial.staging / name).is_file() for name in last["files"]):  # else it is being deleted
        if _listed(out) != last["found"]:
            check_output(out, COMMAND, overwrite=overwrite)
        place_folder(partial.staging, partial.out, last["placing"], completing())
    reports: dict[str, dict[str, Any]] = {}
    for record in partial.records:
        reports |= record.get("tensors", {})
    partial.remove()
    return report_of(last["model"], last["names"], reports, last.get("notes", ()))
