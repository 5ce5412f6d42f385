"""Remove heads, neurons, experts or layers from a checkpoint larger than the memory: plan, score, choose, cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_prune.checkpoint.files import MASK_FILE, find_file
from hf_prune.checkpoint.sources import check_model_source
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.conversion.streaming.layer_losses import layer_losses_by_blocks
from hf_prune.conversion.streaming.meta_model import MetaModel, load_meta_model
from hf_prune.conversion.streaming.shrunk_output import ShrunkOutput
from hf_prune.conversion.streaming.unit_curves import unit_curves
from hf_prune.conversion.streaming.unit_repair import repair_units
from hf_prune.errors import CheckpointError, PlanError
from hf_prune.evaluation.sparsity_report import SparsityReport
from hf_prune.planning.config import PruningConfig
from hf_prune.structured.choose_units import open_plan, with_choice
from hf_prune.structured.routing import refuse_unequal_routers
from hf_prune.structured.shrink_record import holding_layers
from hf_prune.structured.unit_plan import UnitPlan


def prepare_units(source: str, config: PruningConfig) -> tuple[MetaModel, UnitPlan]:
    """A checkpoint's model on the meta device, and a plan without the scores of units. No weight is read.

    Returns:
        The model; and the plan, in scope layer without layers with the number of units that each group keeps.

    Raises:
        CheckpointError: If the source is damaged, does not fit its config, or has masks.
        PlanError: If nothing can be removed, or the budget cannot be met.
    """
    meta_model = load_meta_model(source, unknown="left out")
    if find_file(source, MASK_FILE, {"local_files_only": check_model_source(source)}) is not None:
        raise CheckpointError(
            f"{source!r} has masks of single weights ({MASK_FILE}), which streaming does not make smaller: remove "
            f"{'s and '.join(config.granularity)}s before single weights, prune without streaming, or delete the file"
        )
    plan = open_plan(meta_model.model, config)
    if plan.layers:  # how many units go depends on which layers do
        return meta_model, plan
    # In scope layer sizes do not depend on scores; in scope global, this still tells a budget that is out of reach.
    uniform = dataclasses.replace(plan, config=config.replace(scope="layer"))
    uniform = with_choice(meta_model.model, uniform, {}, {})
    if config.scope == "global":
        return meta_model, plan
    assert uniform.choice is not None
    some = {name: torch.arange(number) for name, number in uniform.choice.kept.items()}
    refuse_unequal_routers(meta_model.model, some, ())
    return meta_model, dataclasses.replace(uniform, config=config)


def remove_units(
    source: str,
    meta_model: MetaModel,
    plan: UnitPlan,
    batches: Sequence[Mapping[str, Any]],
    journal: Journal,
    out: Path,
    *,
    cache_bytes: int,
    overwrite: bool,
    progress: bool | None,
) -> SparsityReport:
    """Choose the units that stay, and write a checkpoint without the others.

    Args:
        source: Folder or Hub id.
        meta_model: Its model.
        plan: The plan, see :func:`prepare_units`.
        batches: Mappings of model inputs, for criteria that learn from them.
        journal: Of this run.
        out: The folder to write.
        cache_bytes: Most bytes of block outputs that are kept in memory.
        overwrite: Replace existing files in ``out``.
        progress: Show progress bars.

    Returns:
        The report of the masked model, with the structure of the shrunk one.

    Raises:
        CalibrationError: If the batches are unusable.
        PlanError: If a weight is not finite, or layers would keep different numbers of experts and must not.
    """
    model = meta_model.model
    curves, sensitivity = unit_curves(meta_model, plan, batches, journal, cache_bytes, progress)
    with ExitStack() as resources:
        if sensitivity is not None:
            resources.callback(sensitivity.close)
        losses = layer_losses_by_blocks(meta_model, plan, batches, journal, cache_bytes, progress)
        plan = with_choice(model, plan, curves, losses)
        assert plan.choice is not None
        refuse_unequal_routers(model, plan.kept, plan.choice.layers)
        _refuse_shared(model, plan.choice.layers)
        repaired = repair_units(meta_model, plan, batches, sensitivity, journal, cache_bytes, progress)
    output = ShrunkOutput(meta_model, plan, journal, repaired)
    if not output.is_sound():  # the files of the interrupted run were changed
        journal.forget({"copied", "tensors"})
        output = ShrunkOutput(meta_model, plan, journal, repaired)
    output.write(progress)
    return output.finish(source, out, overwrite)


def _refuse_shared(model: nn.Module, layers: Collection[str]) -> None:
    """Refuse layers that share a weight with what stays: it would have to stay, and its name goes."""
    for name, holding in holding_layers(model, layers).items():
        if None in holding and len(holding) > 1:
            raise PlanError(
                f"{name} is in a removed layer of {type(model).__name__} and elsewhere: prune without streaming"
            )
