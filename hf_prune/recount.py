"""What a report counts anew where writing a checkpoint has rounded values, some of them to zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_prune.errors import DataError
from hf_prune.packed_files import PackedFiles, file_paths
from hf_prune.packed_format import is_packed, unseal
from hf_prune.report import SparsityReport, TensorReport, WeightStatistics
from hf_prune.unpacking import unpack


def is_rounded(folder: Path) -> bool:
    """Whether a checkpoint was written with ``values="int8"``.

    Raises:
        CheckpointError: If it is damaged.
    """
    first = next(iter(sorted(folder.glob("model*.safetensors"))), None)
    return first is not None and is_packed(first) and unseal(first).get("values", "exact") != "exact"


def recounted(report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A report with the zeros and statistics that rounding made.

    Args:
        report: Of the values before, as of :meth:`SparsityReport.to_dict`; of a shrunk model it stays as it is.
        folder: The checkpoint that was written.

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
