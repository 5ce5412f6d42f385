"""Count a saved model, and write its report, pictures and card."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hf_prune.checkpoint.files import SPARSITY_REPORT
from hf_prune.evaluation.plots import write_plots
from hf_prune.evaluation.sparsity_report import SparsityReport, sparsity_report
from hf_prune.evaluation.structure_report import structure_report
from hf_prune.evaluation.tasks import LanguageModelingTask
from hf_prune.evaluation.weight_statistics import weight_histogram
from hf_prune.hub.card import as_saved, render_facts, write_card
from hf_prune.hub.card_data import read_card_data
from hf_prune.hub.checksums import PICTURES
from hf_prune.planning.config import PruningConfig
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.structured.shrink_record import RECORD
from hf_prune.utils.files import write_json
from hf_prune.utils.formatting import display_name


def full_report(model: Any) -> SparsityReport:
    """The sparsity report of a model, with the units that were removed from a shrunk one."""
    report = sparsity_report(model)
    if getattr(getattr(model, "config", None), RECORD, None) is not None:
        report = dataclasses.replace(report, structure=structure_report(model))
    return report


def describe_model(model: Any, folder: str | Path, *, plots: bool = True, **more: Any) -> str:
    """Count the zeros of a saved model, and write the report and the card into its folder.

    If values were rounded on saving, the model is loaded again first.

    Args:
        model: The model.
        folder: Its checkpoint.
        plots: Also replace the card's pictures; a shrunk model and one without masks have none.
        **more: As for :func:`read_card_data`.

    Returns:
        The card.

    Raises:
        DataError: If the metadata of the previous card is not valid YAML, or the Hub would not accept a fact; the
            folder is unchanged.
    """
    folder = Path(folder)
    model = as_saved(model, folder)
    report, store = full_report(model), MaskStore.of(model)
    draws = plots and store is not None and report.structure is None
    if plots:
        more["pictures"] = PICTURES if draws else {}
    data = read_card_data(folder, **{**more, "report": report.to_dict()})
    render_facts(folder, data)  # raises before anything is written
    for name in PICTURES if plots else ():
        (folder / name).unlink(missing_ok=True)
    if draws and store is not None:
        write_plots(folder, report, None, weight_histogram(model, list(store.masks)), report.model_name)
    write_json(folder / SPARSITY_REPORT, report.to_dict())
    return write_card(folder, data)


def calibration_of(config: PruningConfig | None, task: Any) -> str | None:
    """The data that a pruning learned from, in words; None if it learned from none.

    Args:
        config: The settings.
        task: The data, a task of :mod:`hf_prune.evaluation.tasks`.
    """
    if config is None or not config.needs_data or task is None:
        return None
    where = display_name(task.source) + ("" if Path(task.source).is_file() else f", {task.calibration_split}")
    kind = "windows" if isinstance(task, LanguageModelingTask) else "samples"
    return f"up to {task.calibration_samples} {kind} of {where}"
