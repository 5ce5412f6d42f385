"""Write a checkpoint with masks made from its zeros."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from hf_prune.auto import load_native
from hf_prune.checkpoint.files import CARD_DATA, INDEX, REPORTS, weight_files
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.pruning.adopt_zeros import MIN_SPARSITY, AdoptionReport, adopt_zeros
from hf_prune.utils.folders import copy_beside
from hf_prune.utils.output_folder import check_output, source_folder


def adopt_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    min_sparsity: float = MIN_SPARSITY,
    overwrite: bool = False,
) -> AdoptionReport:
    """Write a checkpoint, in which another tool left zeros, with masks for them; see :func:`hf_prune.adopt_zeros`.

    Args:
        source: The folder of the checkpoint.
        out: The folder for the new one; files beside the weights are copied.
        min_sparsity: Weights with a smaller share of zeros get no mask.
        overwrite: Replace what is in the way in ``out``.

    Raises:
        CheckpointError: If ``out`` is the source, or something is in the way.
    """
    source = source_folder(source)
    out = check_output(out, "migrate", [source], overwrite=overwrite)
    model = load_native(str(source))
    report = adopt_zeros(model, min_sparsity=min_sparsity)
    with staged_checkpoint(out, "migrate", overwrite=overwrite) as staging:
        model.save_pretrained(staging)
        written = [
            INDEX,
            *(path.name for path in staging.iterdir()),
            *(Path(file).name for file in weight_files(source, {})),
        ]
        skipped = copy_beside(source, staging, written, ["model*.safetensors*", *REPORTS, CARD_DATA])
    return dataclasses.replace(report, left={**report.left, **dict.fromkeys(skipped, "which was not carried over")})
