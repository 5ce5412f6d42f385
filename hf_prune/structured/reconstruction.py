"""How much each unit contributes to the outputs of the matrix that consumes it, weighted by the model's predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_prune.architectures.unit_groups import UnitGroup, weight_names
from hf_prune.calibration.batches import Batches
from hf_prune.calibration.input_reader import InputReader
from hf_prune.calibration.sensitivity import Sensitivity, measure_sensitivity
from hf_prune.errors import PlanError
from hf_prune.kernels.matrix import Target
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.planning.plan import PruningPlan, targets_of
from hf_prune.pruning.held_masks import mask_of
from hf_prune.pruning.learned_allocation import gathered_together, weighted_grams
from hf_prune.pruning.mask_store import checked_masks
from hf_prune.structured.expert_calls import ExpertCalls
from hf_prune.structured.loss_curves import (
    Curve,
    additive_curve,
    curves_of_slabs,
    reconstruction_curve,
    redundancy_curve,
)
from hf_prune.structured.unit_scores import scores_where_missed, squared_weights, warn_of_missed_experts


@dataclass(frozen=True)
class Reading:
    """How a model is read, in memory or block by block.

    Args:
        open: Makes a reader of the inputs of some weights.
        measure: Measures how much the predictions depend on the outputs of a reader's targets.
        holding: Inside, the model has the values of some parameters.
    """

    open: Callable[[Sequence[Target]], InputReader]
    measure: Callable[[InputReader], Sensitivity]
    holding: Callable[[Iterable[str]], AbstractContextManager[object]]

    @classmethod
    def in_memory(
        cls, model: nn.Module, config: PruningConfig, batches: Batches, progress: bool | None, cache_bytes: int
    ) -> Reading:
        """Of a model that is loaded.

        Args:
            model: The model.
            config: Its ``seed`` draws labels and directions.
            batches: Calibration batches.
            progress: Show progress bars.
            cache_bytes: See :func:`hf_prune.prune`.
        """
        return cls(
            lambda targets: InputReader(model, targets, batches, cache_bytes=cache_bytes),
            lambda reader: measure_sensitivity(reader, config.seed, progress, cache_bytes),
            lambda names: nullcontext(),
        )


def reconstruction_curves(
    model: nn.Module, config: PruningConfig, groups: Sequence[UnitGroup], reading: Reading
) -> tuple[dict[str, Curve], Sensitivity]:
    """The :func:`reconstruction_curve` of each group; inputs and outputs are weighted by squared gradients.

    Args:
        model: The model, which is not changed.
        config: The settings.
        groups: Groups with one consumer each.
        reading: How the model is read.

    Returns:
        The curves by group, and the sensitivity of the predictions, which a repair uses too; close it after use.

    Raises:
        PlanError: If several matrices consume the units of a group, as where all layers share their heads.
    """
    for group in groups:
        if len(group.consumers) > 1:
            raise PlanError(
                f"criterion 'reconstruction' compares the outputs of one matrix, and the {group.kind}s of {group.name} "
                f"go into {len(group.consumers)}: choose criterion 'fisher'"
            )

    missed: dict[str, list[int]] = {}
    is_in_experts = ExpertCalls(model, groups).is_in_experts

    def curve(group: UnitGroup, target: Target, gram: Tensor, outputs: Tensor) -> Curve:
        with reading.holding(piece.name for piece in group.slices):
            weight = target.matrix(model.get_parameter(target.name).detach())
            curves = []
            for number, of_expert in enumerate(gram if gram.dim() == 3 else gram[None]):
                rows = target.rows(number)
                if bool(outputs[rows].any()) or not is_in_experts(group):
                    curves.append(reconstruction_curve(weight[rows], of_expert, outputs[rows], group.units))
                else:  # no token came to it: by magnitude, and it costs nothing
                    order = squared_weights(model, group).reshape(-1, group.units)[number].argsort(stable=True)
                    curves.append(Curve(order, torch.zeros(group.units + 1, dtype=torch.float64)))
                    missed.setdefault(group.name, []).append(number)
        return curves_of_slabs(curves) if group.choices else curves[0]

    curves, sensitivity = _curves_of_consumers(model, config, groups, reading, curve, groups)
    warn_of_missed_experts(missed, sum(max(1, group.choices) for group in groups))
    return curves, sensitivity


def redundancy_curves(
    model: nn.Module,
    config: PruningConfig,
    groups: Sequence[UnitGroup],
    reading: Reading,
    fisher: Mapping[str, Tensor],
) -> tuple[dict[str, Curve], Sensitivity]:
    """The :func:`redundancy_curve` of each group; of its gates alone if several matrices consume its units.

    Args:
        model: The model, which is not changed.
        config: The settings.
        groups: Groups of it.
        reading: How the model is read.
        fisher: (units,) mean squared gradients of the gates, by group.

    Returns:
        The curves by group, and the sensitivity of the predictions, which a repair uses too; close it after use.
    """

    def curve(group: UnitGroup, target: Target, gram: Tensor, outputs: Tensor) -> Curve:
        if bool(fisher[group.name].any()):
            return redundancy_curve(fisher[group.name], gram, group.units)
        with reading.holding(piece.name for piece in group.slices):
            return additive_curve(scores_where_missed(model, group, fisher[group.name], [0]))

    single = [group for group in groups if len(group.consumers) == 1]
    curves, sensitivity = _curves_of_consumers(model, config, single, reading, curve, groups)
    by_group = {group.name: curves.get(group.name) or additive_curve(fisher[group.name]) for group in groups}
    return by_group, sensitivity


def measured_targets(model: nn.Module, config: PruningConfig, groups: Sequence[UnitGroup]) -> Sequence[Target]:
    """The weights of groups on whose outputs it is measured how much the predictions depend."""
    names = repaired_weights(model, config, groups) or [p.name for group in groups for p in group.consumers]
    return targets_of(inner_plan(model, config, names))


def _curves_of_consumers(
    model: nn.Module,
    config: PruningConfig,
    groups: Sequence[UnitGroup],
    reading: Reading,
    curve: Callable[[UnitGroup, Target, Tensor, Tensor], Curve],
    measured: Sequence[UnitGroup],
) -> tuple[dict[str, Curve], Sensitivity]:
    """The curve of each group from the inputs of its consumer in the dense model.

    Args:
        model: The model.
        config: The settings.
        groups: Groups with one consumer each.
        reading: How the model is read.
        curve: Makes a curve of a group, its consumer, the gram of the inputs, and how much each output counts.
        measured: Groups for whose weights the sensitivity is measured.
    """
    by_weight = {group.consumers[0].name: group for group in groups}
    curves: dict[str, Curve] = {}
    with reading.open(measured_targets(model, config, measured)) as reader:
        steps = reader.order()
        sensitivity = reading.measure(reader)
        try:
            for step in gathered_together(reader, steps):
                reader.finish(step)
                consumers = [target for target in step if target.name in by_weight]
                for target, gram in weighted_grams(reader, consumers, sensitivity) if consumers else ():
                    group = by_weight[target.name]
                    curves[group.name] = curve(group, target, gram, sensitivity.outputs[target.name])
        except BaseException:
            sensitivity.close()
            raise
    return curves, sensitivity


def repaired_weights(model: nn.Module, config: PruningConfig, groups: Sequence[UnitGroup]) -> list[str]:
    """Names of the matrices that a repair solves again; none without a repair.

    With the objective "loss" these are all matrices of the groups: the ones that compute the units aim at the outputs
    of the dense model. With the objective "layer" they are only the ones that consume the units: the others would learn
    to make up for inputs that have changed for good, and their corrections go wrong more and more from layer to layer.

    Args:
        model: The model.
        config: The settings.
        groups: The groups that may lose units.
    """
    if config.repair is None:
        return []
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    names = weight_names(groups, consumers_only=config.objective != "loss")
    return [name for name in names if name not in embeddings and model.get_parameter(name).numel()]


def inner_plan(model: nn.Module, config: PruningConfig, names: Sequence[str], sparsity: float = 0.0) -> PruningPlan:
    """A plan of single weights whose targets are matrices of groups, with the repair of the config.

    Args:
        model: The model.
        config: The settings.
        names: The parameters.
        sparsity: The share of their weights that is removed; at least what earlier masks remove.
    """
    masks = [mask for name in names if (mask := mask_of(model, name)) is not None]
    size = sum(model.get_parameter(name).numel() for name in names)
    sparsity = max(sparsity, sum(mask.numel() - mask.kept() for mask in masks) / max(1, size))
    inner = PruningConfig(
        sparsity,
        target_modules=".*",
        seed=config.seed,
        repair=config.repair,
        objective=config.objective if config.repair is not None else "layer",
        calibration_order=config.calibration_order,
        polish=config.polish,
    )
    only = {name.rpartition(".")[0] for name in names}
    loaded = not any(model.get_parameter(name).is_meta for name in names)
    return make_plan(model, inner, loaded=loaded, masks=checked_masks(model), only=only)
