"""The statistics that a plan needs of every target, gathered on the model as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from itertools import chain
from typing import Any

from torch import Tensor, nn

from hf_prune.calibration.batches import Batches, require_batches
from hf_prune.calibration.gradients import mean_gradients, squared_gradients
from hf_prune.calibration.input_reader import InputReader
from hf_prune.criteria.base import GRADIENTS, INPUTS, LABELLED, WeightStats, derived_seed
from hf_prune.kernels.matrix import Target
from hf_prune.planning.plan import PruningPlan, targets_of
from hf_prune.utils.formatting import first_few
from hf_prune.utils.notices import warn_user


def collect_stats(
    model: nn.Module, plan: PruningPlan, calibration: Batches | None = None, progress: bool | None = None
) -> dict[str, WeightStats]:
    """Gather the statistics that a plan needs of every target, on the model as it is.

    Statistics of the inputs are gathered for all targets at once, whatever the plan's ``calibration_order``:
    :func:`hf_prune.pruning.sequential.prune_sequentially` gathers them layer by layer. Blocks of the Fisher matrix are
    gathered by :func:`hf_prune.pruning.fisher.prune_by_fisher`, for a few weights at a time.

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
    needs, targets = plan.needs, targets_of(plan)
    names = [t.name for t in targets]
    fields: dict[str, dict[str, Any]] = {name: {} for name in names}
    if needs:
        batches = require_batches(plan.config, calibration)
        if needs & GRADIENTS and needs & INPUTS:
            batches = list(batches)  # read twice
        gradients: dict[str, dict[str, Tensor]] = {}
        if labelled := needs & LABELLED:
            gradients = mean_gradients(model, names, batches, labelled, progress)
        if "squared_gradient" in needs:
            gradients["squared_gradient"] = squared_gradients(model, names, batches, plan.config.seed, progress)
        for t in targets:
            for need, tensors in gradients.items():
                fields[t.name][need] = t.matrix(tensors[t.name])
        if labelled and plan.config.scope != "global":
            warn_of_unreached(chain.from_iterable(fill_unreached(t, fields[t.name], labelled) for t in targets))
        if inputs := needs & INPUTS:
            with InputReader(model, targets, batches) as reader:
                reader.order()
                for name, statistics in reader.gather(targets, inputs, progress=progress).items():
                    fields[name].update(statistics)
    return {name: WeightStats(seed=derived_seed(plan.config.seed, name), **values) for name, values in fields.items()}


def fill_unreached(target: Target, gradients: Mapping[str, Tensor], needs: Set[str]) -> list[str]:
    """Have gradients of 1 stand for those that are 0 in a whole matrix, such as that of an expert without tokens.

    All its scores would be equal, and its first weights would go.

    Args:
        target: The target.
        gradients: Its statistics, (out, in); changed in place.
        needs: Those of them that are gradients.

    Returns:
        The names of such matrices.
    """
    without = []
    for number in range(target.slabs if target.layout != "conv" else 1):
        rows = target.rows(number) if target.layout != "conv" else slice(None)
        parts = [gradients[need][rows] for need in needs]
        if not any(bool(part.any()) for part in parts):
            without.append(target.slab(number).name if target.layout != "conv" else target.name)
            for part in parts:
                part.fill_(1)
    return without


def warn_of_unreached(matrices: Iterable[str]) -> None:
    """Say which matrices :func:`fill_unreached` has found, if any."""
    if without := list(matrices):
        warn_user(
            f"the predictions depend on no weight of {len(without)} matrices on these batches ({first_few(without)}): "
            f"they are pruned by magnitude"
        )
