"""prune(): the whole story on one screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from hf_prune.calibration import Batches, collect_stats
from hf_prune.config import PruningConfig
from hf_prune.criteria.base import WeightStats
from hf_prune.errors import CalibrationError, ConfigError
from hf_prune.masking import MaskStore
from hf_prune.plan import PlannedTensor, PruningPlan, make_plan
from hf_prune.selection import keep_highest, keep_highest_per_row
from hf_prune.targets import Target, is_finite
from hf_prune.units import block_sums, spread_blocks

Model = TypeVar("Model", bound=nn.Module)


@overload
def prune(
    model: nn.Module,
    config: PruningConfig | float | None = ...,
    *,
    calibration: Batches | None = ...,
    keep_dense: bool = ...,
    dry_run: Literal[True],
    progress: bool = ...,
    **settings: Any,
) -> PruningPlan: ...


@overload
def prune(
    model: Model,
    config: PruningConfig | float | None = ...,
    *,
    calibration: Batches | None = ...,
    keep_dense: bool = ...,
    dry_run: Literal[False] = ...,
    progress: bool = ...,
    **settings: Any,
) -> Model: ...


def prune(
    model: Model,
    config: PruningConfig | float | None = None,
    *,
    calibration: Batches | None = None,
    keep_dense: bool = False,
    dry_run: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Model | PruningPlan:
    """Prune a model in place.

    Pruning again only ever adds zeros: 0.3 and then 0.5 removes 0.5 in all.

    Args:
        model: Any torch module; its weights become zero where they are removed.
        config: The settings, or just the sparsity.
        calibration: Labelled batches, for criteria that need them.
        keep_dense: Keep a copy of the dense weights, so that ``discard_masks`` can give them back.
        dry_run: Change nothing and return the plan.
        progress: Show a progress bar while calibrating.
        **settings: Fields of :class:`PruningConfig`, in place of, or on top of, ``config``.

    Returns:
        The model, or the plan for ``dry_run``.

    Raises:
        ConfigError: If a setting is invalid.
        PlanError: If the settings do not fit the model.
        CalibrationError: If calibration data is missing or unusable.
        MaskError: If ``keep_dense`` is asked for after a pruning without it.

    Example:
        >>> model = prune(torch.nn.Linear(4, 4), 0.5)
        >>> int((model.weight == 0).sum())
        8
    """
    config = resolve_config(config, settings)
    plan = make_plan(model, config)
    if dry_run:
        return plan
    stats = collect_stats(model, plan, calibration, progress)
    store = MaskStore.of(model) or MaskStore()
    masks, weights = compute_masks(model, plan, stats, store.masks)
    store.update(model, masks, weights, config, keep_dense)
    return model


def resolve_config(config: PruningConfig | float | None, settings: Mapping[str, Any]) -> PruningConfig:
    """One config from what a caller passed.

    Raises:
        ConfigError: If a setting is unknown or invalid, or the sparsity is given twice.
    """
    if isinstance(config, PruningConfig):
        return config.replace(**settings) if settings else config
    values = dict(settings)
    if config is not None:
        if "sparsity" in values:
            raise ConfigError(f"sparsity is given twice: {config!r} and {values['sparsity']!r}")
        values["sparsity"] = config
    return PruningConfig.from_dict(values)


@torch.no_grad()
def compute_masks(
    model: nn.Module, plan: PruningPlan, stats: Mapping[str, WeightStats], old_masks: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The masks that a plan leads to, without touching the model.

    Args:
        model: The model.
        plan: Its plan.
        stats: What calibration gathered.
        old_masks: Masks of earlier prunings, by parameter name.

    Returns:
        Bool masks, and the weights that the criterion repaired, both in the parameters' own layouts, by name.
    """
    parameters = dict(model.named_parameters())
    criterion, granularity = plan.criterion, plan.granularity

    def matrix(target: Target) -> Tensor:
        return target.matrix(parameters[target.name].detach())

    def units(target: Target, scores: Tensor) -> Tensor:
        if not is_finite(scores):
            raise CalibrationError(
                f"criterion {criterion.name!r} gave scores that are not finite for {target.name}: "
                f"check the calibration data"
            )
        old = old_masks.get(target.name)
        return unit_scores(scores, granularity.block, None if old is None else target.matrix(old))

    if plan.config.scope == "global":
        targets = [tensor.target for tensor in plan.tensors]
        kept = keep_highest(
            [lambda t=t: units(t, criterion.scores(matrix(t), stats[t.name])) for t in targets],  # type: ignore[misc]
            plan.remove,
        )
        spread = [spread_blocks(keep, granularity.block) for keep in kept]
        return {t.name: t.native(keep) for t, keep in zip(targets, spread, strict=True)}, {}

    masks, weights = {}, {}
    for tensor in plan.tensors:
        target = tensor.target

        def select(scores: Tensor, tensor: PlannedTensor = tensor) -> Tensor:
            unit = units(tensor.target, scores)
            pools = tensor.units // tensor.pool
            assert tensor.remove is not None
            if pools == 1:
                keep = keep_highest([lambda: unit], tensor.remove)[0]
            else:
                keep = keep_highest_per_row(unit.reshape(pools, tensor.pool), tensor.remove // pools)
            return spread_blocks(keep.view(unit.shape), granularity.block)

        before = matrix(target)
        keep, after = criterion.prune_weight(before, stats[target.name], select)
        masks[target.name] = target.native(keep)
        if after is not before:
            weights[target.name] = target.native(after)
    return masks, weights


def unit_scores(scores: Tensor, block: tuple[int, int], old: Tensor | None) -> Tensor:
    """Scores of units from scores of weights; what earlier prunings removed ranks below everything.

    Args:
        scores: (out, in) float32.
        block: (outputs, inputs) of one unit.
        old: (out, in) bool mask of earlier prunings, or None.

    Returns:
        (out / rows, in / columns) float32, -inf where nothing of the unit is left.
    """
    if old is None:
        return block_sums(scores, block).contiguous()
    left = old.to(scores.device)
    gone = block_sums(left.float(), block) == 0
    return block_sums(scores.masked_fill(~left, 0), block).masked_fill(gone, float("-inf")).contiguous()
