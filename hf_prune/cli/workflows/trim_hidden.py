"""Trim the hidden states of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from hf_prune.checkpoint.companions import copy_companions
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.cli.workflows.loading import load_for_task
from hf_prune.evaluation.tasks import Task
from hf_prune.planning.config import PruningConfig
from hf_prune.structured.hidden.trim import HiddenResult, trim_hidden
from hf_prune.utils.files import write_json
from hf_prune.utils.locks import writes_alone
from hf_prune.utils.output_folder import check_output

_LEARNS = PruningConfig(sparsity=0.5, criterion="wanda")  # learns from inputs, as the choice of dimensions does


@writes_alone("trim-hidden")
def trim_hidden_checkpoint(
    source: str, size: int | float, out: Path, task: Task, *, overwrite: bool = False
) -> HiddenResult:
    """Remove dimensions of the hidden states of a checkpoint, into a folder: weights and ``hidden_report.json``.

    Args:
        source: Folder or Hub id.
        size: How many dimensions stay, or which share; see :func:`hf_prune.trim_hidden`.
        out: The folder: new, empty, or an earlier output.
        task: What the dimensions are chosen on.
        overwrite: Replace what is in the way in ``out``.

    Raises:
        CheckpointError: If ``out`` is the source, or something is in the way.
        DataError: If the source cannot be found, or does not read the data.
    """
    check_output(out, "trim-hidden", [source], overwrite=overwrite)
    model, tokenizer = load_for_task(source, task, labelled=False)
    batches = task.calibration_batches([_LEARNS], model, tokenizer)
    result = trim_hidden(model, size, calibration=batches, progress=True)
    with staged_checkpoint(out, "trim-hidden", overwrite=overwrite) as staging:
        model.save_pretrained(staging)
        copy_companions(source, staging)
        write_json(staging / "hidden_report.json", result.to_dict())
    return result
