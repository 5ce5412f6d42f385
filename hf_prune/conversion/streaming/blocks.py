"""Prune with calibration data a model whose weights are read block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_prune.calibration.batches import without_labels
from hf_prune.calibration.input_reader import InputReader
from hf_prune.conversion.streaming.lazy_weights import LazyWeights
from hf_prune.conversion.streaming.meta_model import explain_meta_error
from hf_prune.conversion.streaming.output import Output
from hf_prune.criteria.base import INPUTS
from hf_prune.errors import CalibrationError, HfPruneError
from hf_prune.planning.plan import PlannedTensor, PruningPlan, targets_of
from hf_prune.pruning.sequential import prune_tensor
from hf_prune.pruning.weight_norm import lengths_name
from hf_prune.utils.progress import Bar


@torch.no_grad()
def prune_blocks(
    output: Output,
    plan: PruningPlan,
    batches: Sequence[Mapping[str, Any]],
    cache_bytes: int,
    scratch: Path,
    progress: bool = False,
) -> None:
    """Prune targets in the order of their calls, each with inputs from the pruned ones before it.

    The same steps as in :func:`prune_sequentially`, with the weights of one block in memory while statistics are
    gathered, and those of one target while it is pruned. For targets that an earlier run finished, only the outputs of
    their blocks are computed.

    Args:
        output: The checkpoint that weights are read from and written to.
        plan: A plan with scope row or layer.
        batches: Mappings of model inputs.
        cache_bytes: Most bytes of block outputs that are kept in memory.
        scratch: A folder for the other block outputs.
        progress: Show a progress bar.

    Raises:
        CalibrationError: If the batches are unusable.
        PlanError: If the model cannot run block by block.
    """
    model = output.meta_model.model
    # An encoder-decoder makes decoder inputs from labels; other models only compute a loss from them.
    needs_labels = bool(getattr(model.config, "is_encoder_decoder", False))
    if not needs_labels:
        batches = [without_labels(model, batch) if isinstance(batch, Mapping) else batch for batch in batches]
    output.meta_model.load_buffers()
    reader = InputReader(model, targets_of(plan), batches, cache_bytes=cache_bytes, folder=scratch)
    planned = {tensor.target.name: tensor for tensor in plan.tensors}
    lazy = LazyWeights(output.meta_model, output.read, output.read_rows, output.targets, skip_head=not needs_labels)
    try:
        counted: Bar[object] = Bar(total=len(plan.tensors), desc="Pruning", unit="weight", progress=progress)
        with reader, lazy, counted as bar:
            for step in reader.order():
                lazy.release()
                reader.advance()
                remaining = [planned[target.name] for target in step if not output.done(target.name)]
                bar.update(len(step) - len(remaining))
                for tensor in _prune_step(output, plan, reader, lazy, remaining):
                    bar.note(tensor.target.module)
                    bar.update()
                reader.finish(step)
    except (RuntimeError, CalibrationError) as error:
        cause = error.__cause__ if isinstance(error, CalibrationError) else error
        if not isinstance(cause, RuntimeError) or isinstance(cause, HfPruneError):
            raise
        if (explained := explain_meta_error(model, cause)) is cause:
            raise
        raise explained from cause


def _prune_step(
    output: Output, plan: PruningPlan, reader: InputReader, lazy: LazyWeights, step: Sequence[PlannedTensor]
) -> list[PlannedTensor]:
    """Gather the statistics of targets that share a pass over the batches, and prune them one by one."""
    if not step:
        return []
    gathered = reader.gather([tensor.target for tensor in step], plan.needs & INPUTS)
    for tensor in step:
        name = tensor.target.name
        beside = (output.biases.get(name), lengths_name(name))
        lazy.hold([name, *(other for other in beside if other is not None)])
        mask, new = prune_tensor(
            reader.model, plan, tensor, gathered.pop(name), output.previous_masks, None, None, output.biases
        )
        output.write(tensor, lazy[name], mask, new)
    lazy.release()
    return list(step)
