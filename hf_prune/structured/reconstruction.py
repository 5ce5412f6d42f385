"""What each unit is worth to the outputs of the matrix that consumes it, in units of the model's predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.calibration.input_reader import Batches, InputReader
from hf_prune.calibration.sensitivity import Sensitivity, measure_sensitivity
from hf_prune.errors import PlanError
from hf_prune.kernels.matrix import Target
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.planning.plan import PruningPlan
from hf_prune.pruning.learned_allocation import weighted_grams
from hf_prune.pruning.mask_store import checked_masks, mask_of
from hf_prune.structured.loss_curves import Curve, additive_curve, reconstruction_curve, redundancy_curve


def reconstruction_curves(
    model: nn.Module,
    config: PruningConfig,
    sites: Sequence[UnitGroup],
    batches: Batches,
    progress: bool,
    cache_bytes: int,
) -> tuple[dict[str, Curve], Sensitivity]:
    """See :func:`reconstruction_curve`; inputs and outputs are weighed by squared gradients.

    Args:
        model: The model, which is not changed.
        config: Its ``seed`` is that of labels and directions.
        sites: Sites with one consumer each.
        batches: Calibration batches.
        progress: Show progress bars.
        cache_bytes: See :func:`hf_prune.prune`.

    Returns:
        The curves by site, and how much the predictions depend on what, also for the repair; to be closed.

    Raises:
        PlanError: If several matrices consume the units of a site, as where all layers share their heads.
    """
    for site in sites:
        if len(site.consumers) > 1:
            raise PlanError(
                f"criterion 'reconstruction' compares the outputs of one matrix, and the {site.kind}s of {site.name} "
                f"go into {len(site.consumers)}: choose criterion 'fisher'"
            )

    def curve(site: UnitGroup, target: Target, gram: Tensor, outputs: Tensor) -> Curve:
        return reconstruction_curve(target.matrix(model.get_parameter(target.name).detach()), gram, outputs, site.units)

    return _of_consumers(model, config, sites, batches, progress, cache_bytes, curve)


def redundancy_curves(
    model: nn.Module,
    config: PruningConfig,
    sites: Sequence[UnitGroup],
    batches: Batches,
    progress: bool,
    cache_bytes: int,
    fisher: Mapping[str, Tensor],
) -> tuple[dict[str, Curve], Sensitivity]:
    """See :func:`redundancy_curve`; where several matrices consume the units, the gates alone.

    Args:
        model: The model, which is not changed.
        config: Its ``seed`` is that of labels and directions.
        sites: Sites of it.
        batches: Calibration batches.
        progress: Show progress bars.
        cache_bytes: See :func:`hf_prune.prune`.
        fisher: (units,) mean squared gradients of the gates of each site.

    Returns:
        The curves by site, and how much the predictions depend on what, also for the repair; to be closed.
    """

    def curve(site: UnitGroup, target: Target, gram: Tensor, outputs: Tensor) -> Curve:
        return redundancy_curve(fisher[site.name], gram, site.units)

    single = [site for site in sites if len(site.consumers) == 1]
    curves, sensitivity = _of_consumers(model, config, single, batches, progress, cache_bytes, curve, sites)
    return {site.name: curves.get(site.name) or additive_curve(fisher[site.name]) for site in sites}, sensitivity


def _of_consumers(
    model: nn.Module,
    config: PruningConfig,
    sites: Sequence[UnitGroup],
    batches: Batches,
    progress: bool,
    cache_bytes: int,
    curve: Callable[[UnitGroup, Target, Tensor, Tensor], Curve],
    every: Sequence[UnitGroup] | None = None,
) -> tuple[dict[str, Curve], Sensitivity]:
    """The curve of each site, from what flows into its consumer in the dense model."""
    by_weight = {site.consumers[0].name: site for site in sites}
    curves: dict[str, Curve] = {}
    every = every or sites
    names = repaired_weights(model, config, every) or [part.name for site in every for part in site.consumers]
    plan = inner_plan(model, config, names)
    cache_bytes //= 4  # the sensitivities stay for the repair, as one of the four shelves that it keeps
    with InputReader(model, plan, batches, cache_bytes=cache_bytes) as reader:
        steps = reader.order()
        sensitivity = measure_sensitivity(reader, config.seed, progress, cache_bytes)
        try:
            for step in steps:
                consumers = [tensor for tensor in step if tensor.target.name in by_weight]
                for tensor, gram in weighted_grams(reader, consumers, sensitivity) if consumers else ():
                    target, site = tensor.target, by_weight[tensor.target.name]
                    curves[site.name] = curve(site, target, gram, sensitivity.outputs[target.name])
                reader.finish(step)
        except BaseException:
            sensitivity.close()
            raise
    return curves, sensitivity


def repaired_weights(model: nn.Module, config: PruningConfig, sites: Sequence[UnitGroup]) -> list[str]:
    """Names of the matrices that a repair solves anew; none without a repair.

    With the objective "loss" all of them: those that make the units aim at what the dense model put out. With the
    objective "layer" only those that consume the units: others would learn to make up for inputs that have changed for
    good, and what they add goes wrong by more and more from layer to layer.

    Args:
        model: The model.
        config: The settings.
        sites: Those that may lose units.
    """
    if config.repair is None:
        return []
    parts = [p for s in sites for p in (s.parts if config.objective == "loss" else s.consumers)]
    weights = dict.fromkeys(p.name for p in parts if p.name.endswith(".weight") and model.get_parameter(p.name).numel())
    embeddings = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    return [name for name in weights if name not in embeddings]


def inner_plan(model: nn.Module, config: PruningConfig, names: Sequence[str], sparsity: float = 0.0) -> PruningPlan:
    """A plan whose targets are matrices of sites, with the repair of the config.

    Args:
        model: The model.
        config: The settings.
        names: The parameters.
        sparsity: The share of their weights that goes; at least what earlier masks remove.
    """
    masks = [mask for name in names if (mask := mask_of(model, name)) is not None]
    size = sum(model.get_parameter(name).numel() for name in names)
    sparsity = max(sparsity, sum(int((~mask).sum()) for mask in masks) / max(1, size))
    inner = PruningConfig(
        sparsity,
        target_modules=".*",
        seed=config.seed,
        repair=config.repair,
        objective=config.objective if config.repair is not None else "layer",
        calibration_order=config.calibration_order,
        polish=config.polish,
    )
    return make_plan(model, inner, masks=checked_masks(model), only={name.removesuffix(".weight") for name in names})
