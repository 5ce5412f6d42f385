"""A model's card, written when it is saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hf_prune.evaluation.plots import write_plots
from hf_prune.evaluation.sparsity_report import SparsityReport, sparsity_report
from hf_prune.evaluation.structure_report import structure_report
from hf_prune.evaluation.weight_statistics import weight_histogram
from hf_prune.hub.card import as_saved, render_facts, write_card
from hf_prune.hub.card_data import read_card_data
from hf_prune.hub.checksums import PICTURES
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.structured.shrink_record import RECORD
from hf_prune.utils.files import write_json


def full_report(model: Any) -> SparsityReport:
    """What is zero in a model, and what was taken out of it."""
    report = sparsity_report(model)
    if getattr(getattr(model, "config", None), RECORD, None) is not None:
        report = dataclasses.replace(report, structure=structure_report(model))
    return report


def describe_model(model: Any, folder: str | Path, *, plots: bool = True, **more: Any) -> str:
    """Count what is zero in a model, and write the report and the card into the folder that it was saved in.

    Values that were rounded as they were saved are loaded again, and counted as they are now.

    Args:
        model: The model.
        folder: Its checkpoint.
        plots: Also draw the card's pictures, in place of those that are there; of masks only.
        **more: As of :func:`read_card_data`.

    Returns:
        The card.

    Raises:
        DataError: If the card so far is no YAML, or a fact is not as the Hub wants it; the folder is as it was.
    """
    folder = Path(folder)
    model = as_saved(model, folder)
    report, store = full_report(model), MaskStore.of(model)
    draws = plots and store is not None and report.structure is None
    if plots:
        more["pictures"] = PICTURES if draws else {}
    data = read_card_data(folder, **{**more, "report": report.to_dict()})
    render_facts(folder, data)  # errors come before anything is written
    for name in PICTURES if plots else ():
        (folder / name).unlink(missing_ok=True)
    if draws and store is not None:
        write_plots(folder, report, None, weight_histogram(model, list(store.masks)), report.model_name)
    write_json(folder / "sparsity_report.json", report.to_dict())
    return write_card(folder, data)
