"""Prune a checkpoint without holding its model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_prune.checkpoint.companions import has_tokenizer
from hf_prune.checkpoint.native import load_config, load_tokenizer
from hf_prune.checkpoint.sources import check_model_source
from hf_prune.cli.workflows.card import write_run_card
from hf_prune.cli.workflows.loading import refuse_other_inputs
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.conversion.streaming.placing import is_placing
from hf_prune.conversion.streaming.prune_stream import prune_stream
from hf_prune.conversion.streaming.streamable import check_streamable
from hf_prune.criteria.base import LABELLED
from hf_prune.errors import DataError
from hf_prune.evaluation.sparsity_report import SparsityReport
from hf_prune.evaluation.tasks import Task
from hf_prune.planning.config import PruningConfig
from hf_prune.utils.locks import writes_alone
from hf_prune.utils.notices import reported
from hf_prune.utils.output_folder import check_output


@writes_alone("prune")
@reported()
def stream_checkpoint(
    source: str,
    config: PruningConfig,
    out: Path,
    *,
    task: Task | None = None,
    restart: bool = False,
    overwrite: bool = False,
    command: str | None = None,
) -> SparsityReport:
    """Prune a checkpoint into a folder, without holding its model in memory, and write its card.

    See :func:`hf_prune.prune_stream`.

    Args:
        source: Folder or Hub id.
        config: The settings.
        out: The folder: new, empty, or an earlier output.
        task: Texts, for criteria that learn from data; their labels are only read where the criterion needs them.
        restart: Start from the beginning, whatever an interrupted run left.
        overwrite: Replace what is in the way in ``out``.
        command: The command line, for the card.
    """
    check_streamable(config)
    if not is_placing(Journal(out)):  # else an earlier run has checked it
        check_output(out, "prune", [source], overwrite=overwrite)
    batches = _streaming_batches(source, config, task) if config.needs_data and task is not None else None
    report = prune_stream(source, config, out, calibration=batches, progress=True, restart=restart, overwrite=overwrite)
    write_run_card(out, out, source, config, task if config.needs_data else None, command=command)
    return report


def _streaming_batches(source: str, config: PruningConfig, task: Task) -> list[dict[str, Any]]:
    """Calibration batches for a model that is never loaded."""
    offline = check_model_source(source)
    refuse_other_inputs(source)
    if not has_tokenizer(source, local_files_only=offline):
        raise DataError(f"{source!r} has no tokenizer, which calibration on texts needs: save it beside the model")
    tokenizer = load_tokenizer(source, local_files_only=offline)
    model = load_config(source)
    return task.streaming_batches(
        tokenizer,
        getattr(model.get_text_config(), "max_position_embeddings", None),
        model.label2id if config.needs & LABELLED else None,
    )
