"""Pruning that learns from inputs, on a model whose weights are read block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_prune.calibration.batches import without_labels
from hf_prune.calibration.input_reader import InputReader
from hf_prune.conversion.streaming.lazy_weights import LazyWeights
from hf_prune.conversion.streaming.meta_model import explained
from hf_prune.conversion.streaming.output import Output
from hf_prune.criteria.base import INPUTS
from hf_prune.errors import CalibrationError, HfPruneError
from hf_prune.planning.plan import PlannedTensor, PruningPlan, targets_of
from hf_prune.pruning.sequential import prune_tensor
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
    """Prune in the order of the calls, each target on what the pruned ones before it put out.

    The same steps as :func:`prune_sequentially`, with the weights of one block in memory while
    statistics are gathered, and those of one target while it is pruned. What is on the disk already is not pruned
    again: only the outputs of those blocks are computed.

    Args:
        output: Where the weights come from and go to.
        plan: The plan, of scope row or layer.
        batches: Mappings of model inputs.
        cache_bytes: How much of what finished blocks put out is kept in memory.
        scratch: A folder for the rest of it.
        progress: Show a progress bar.

    Raises:
        CalibrationError: If the batches are unusable.
        PlanError: If the model cannot be run in this way.
    """
    model = output.skeleton.model
    # The labels of a decoder with an encoder are its inputs; other models only compute a loss from them.
    whole = bool(getattr(model.config, "is_encoder_decoder", False))
    if not whole:
        batches = [without_labels(model, batch) if isinstance(batch, Mapping) else batch for batch in batches]
    output.skeleton.load_buffers()
    reader = InputReader(model, targets_of(plan), batches, cache_bytes=cache_bytes, folder=scratch)
    planned = {tensor.target.name: tensor for tensor in plan.tensors}
    lazy = LazyWeights(output.skeleton, output.read, output.read_rows, output.targets, skip_head=not whole)
    try:
        counted: Bar[object] = Bar(total=len(plan.tensors), desc="Pruning", unit="weight", progress=progress)
        with reader, lazy, counted as bar:
            for step in reader.order():
                lazy.release()
                reader.advance()
                left = [planned[target.name] for target in step if not output.done(target.name)]
                bar.update(len(step) - len(left))
                for tensor in _prune_step(output, plan, reader, lazy, left):
                    bar.note(tensor.target.module)
                    bar.update()
                reader.finish(step)
    except (RuntimeError, CalibrationError) as error:
        cause = error.__cause__ if isinstance(error, CalibrationError) else error
        if not isinstance(cause, RuntimeError) or isinstance(cause, HfPruneError):
            raise
        if (told := explained(model, cause)) is cause:
            raise
        raise told from cause


def _prune_step(
    output: Output, plan: PruningPlan, reader: InputReader, lazy: LazyWeights, step: Sequence[PlannedTensor]
) -> list[PlannedTensor]:
    if not step:
        return []
    gathered = reader.gather([tensor.target for tensor in step], plan.needs & INPUTS)
    for tensor in step:
        name = tensor.target.name
        bias = output.biases.get(name)
        lazy.hold([name] if bias is None else [name, bias])
        mask, new = prune_tensor(
            reader.model, plan, tensor, gathered.pop(name), output.old_masks, None, None, output.biases
        )
        output.write(tensor, lazy[name], mask, new)
    lazy.release()
    return list(step)
