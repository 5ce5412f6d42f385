"""Calibration: batches through the dense model, statistics of its targets out."""

from __future__ import annotations

import zlib
from typing import Any

from torch import Tensor, nn

from hf_prune.calibration.gradients import squared_gradients, sum_gradients
from hf_prune.calibration.input_reader import Batches, InputReader
from hf_prune.criteria.base import GRADIENTS, INPUTS, LABELLED, WeightStats
from hf_prune.errors import CalibrationError
from hf_prune.planning.plan import PruningPlan
from hf_prune.utils.distributed import check_same_batches, fail_together, rank_and_world_size
from hf_prune.utils.forward import as_batches


def collect_stats(
    model: nn.Module, plan: PruningPlan, calibration: Batches | None = None, progress: bool = False
) -> dict[str, WeightStats]:
    """Gather what the plan needs to know of every target, on the model as it is.

    Statistics of the inputs are gathered for all targets at once, whatever the plan's ``calibration_order``; see
    :func:`prune_sequentially` for the other one. Blocks of the Fisher matrix are not gathered here, but
    a few weights at a time by :func:`hf_prune.pruning.fisher.prune_by_fisher`.

    Args:
        model: The model; its weights, gradients and modes are as before afterwards.
        plan: Which targets and which criterion.
        calibration: Mappings of tensors that the model takes as keyword arguments, as a DataLoader yields them;
            with labels where the gradients of whole batches are needed. Only read if the plan needs them.
        progress: Show a progress bar.

    Returns:
        Statistics by parameter name; matrices are canonical (out, in).

    Raises:
        CalibrationError: If batches are needed and missing, empty, without labels, or give a loss or
            gradients that are not finite.
    """
    needs = plan.needs
    found: dict[str, dict[str, Any]] = {t.target.name: {} for t in plan.tensors}
    if needs:
        batches = require_batches(plan, calibration)
        if needs & GRADIENTS and needs & INPUTS:
            batches = list(batches)  # read twice
        sums: dict[str, dict[str, Tensor]] = {}
        if gradients := needs & LABELLED:
            sums = sum_gradients(model, plan, batches, gradients, progress)
        if "squared_gradient" in needs:
            names = [t.target.name for t in plan.tensors]
            sums["squared_gradient"] = squared_gradients(model, names, batches, plan.config.seed, progress)
        for t in plan.tensors:
            for need, tensors in sums.items():
                found[t.target.name][need] = t.target.matrix(tensors[t.target.name])
        if inputs := needs & INPUTS:
            with InputReader(model, plan, batches) as reader:
                reader.order()
                for name, tensors in reader.gather(plan.tensors, inputs, progress=progress).items():
                    found[name].update(tensors)
    return {name: WeightStats(seed=weight_seed(plan, name), **values) for name, values in found.items()}


def weight_seed(plan: PruningPlan, name: str) -> int:
    """A weight's own seed, from the config's seed and the parameter's name."""
    return zlib.crc32(f"{plan.config.seed}:{name}".encode())


def require_batches(plan: PruningPlan, calibration: Batches | None) -> Batches:
    """The batches, if there are any; the same ones in every process.

    Raises:
        CalibrationError: If there are none, or the processes have different ones.
    """
    with fail_together():
        found = _require_batches(plan, calibration)
    check_same_batches(found)
    return found


def _require_batches(plan: PruningPlan, calibration: Batches | None) -> Batches:
    if calibration is None:
        config = plan.config
        who = f"criterion {config.criterion!r}" if plan.criterion.needs else f"repair={config.repair!r}"
        who = who if plan.needs else f"allocation={config.allocation!r}" if config.learns_allocation else "polish"
        labels = " and labels" if plan.needs & LABELLED else ""
        raise CalibrationError(
            f"{who} needs calibration data, and got none: pass calibration=batches, "
            f"an iterable of dicts with the model's inputs{labels}"
        )
    batches: Batches = as_batches(calibration)
    return batches if rank_and_world_size()[1] == 1 else list(batches)
