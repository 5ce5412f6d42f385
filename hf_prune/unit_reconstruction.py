"""What each unit is worth to the outputs of the matrix that consumes it, in units of the model's predictions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from hf_prune.activations import Batches, InputReader
from hf_prune.config import PruningConfig
from hf_prune.errors import PlanError
from hf_prune.layer_budgets import weighted_grams
from hf_prune.plan import PruningPlan, make_plan
from hf_prune.sensitivity import measure_sensitivity
from hf_prune.sites import Site
from hf_prune.unit_curves import Curve, reconstruction_curve


def reconstruction_curves(
    model: nn.Module,
    config: PruningConfig,
    sites: Sequence[Site],
    batches: Batches,
    progress: bool,
    cache_bytes: int,
) -> dict[str, Curve]:
    """See :func:`hf_prune.unit_curves.reconstruction_curve`; inputs and outputs are weighed by squared gradients.

    Args:
        model: The model, which is not changed.
        config: Its ``seed`` is that of labels and directions.
        sites: Sites with one consumer each.
        batches: Calibration batches.
        progress: Show progress bars.
        cache_bytes: See :func:`hf_prune.prune`.

    Raises:
        PlanError: If several matrices consume the units of a site, as where all layers share their heads.
    """
    for site in sites:
        if len(site.consumers) > 1:
            raise PlanError(
                f"criterion 'reconstruction' compares the outputs of one matrix, and the {site.kind}s of {site.name} "
                f"go into {len(site.consumers)}: choose criterion 'fisher'"
            )
    by_weight = {site.consumers[0].name: site for site in sites}
    curves: dict[str, Curve] = {}
    plan = consumer_plan(model, config, list(by_weight))
    with InputReader(model, plan, batches, cache_bytes=cache_bytes // 2) as reader:
        steps = reader.order()
        sensitivity = measure_sensitivity(reader, config.seed, progress, cache_bytes // 2)
        try:
            for step in steps:
                for tensor, gram in weighted_grams(reader, step, sensitivity):
                    target, site = tensor.target, by_weight[tensor.target.name]
                    weight = target.matrix(model.get_parameter(target.name).detach())
                    curves[site.name] = reconstruction_curve(weight, gram, sensitivity.outputs[target.name], site.units)
        finally:
            sensitivity.close()
    return curves


def consumer_plan(model: nn.Module, config: PruningConfig, names: Sequence[str], sparsity: float = 0.0) -> PruningPlan:
    """A plan whose targets are the matrices that consume units, with the repair of the config.

    Args:
        model: The model.
        config: The settings.
        names: The parameters.
        sparsity: The share of their weights that goes.
    """
    modules = [re.escape(name.removesuffix(".weight")) for name in names]
    inner = PruningConfig(
        sparsity,
        target_modules="|".join(modules),
        seed=config.seed,
        repair=config.repair,
        objective=config.objective if config.repair is not None else "layer",
        calibration_order=config.calibration_order,
        polish=config.polish,
    )
    return make_plan(model, inner)
