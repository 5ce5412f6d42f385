"""prune(): the whole story on one screen."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal, TypeVar, cast, overload

from torch import Tensor, nn

from hf_prune.architectures.kinds.channel import find_channel_groups, propagate_channel_masks
from hf_prune.calibration.batches import Batches, require_batches
from hf_prune.calibration.dense_outputs import DenseOutputs
from hf_prune.calibration.input_reader import CACHE_BYTES
from hf_prune.calibration.statistics import collect_stats
from hf_prune.criteria.base import CURVATURE, INPUTS
from hf_prune.errors import ConfigError
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan, warn_of
from hf_prune.planning.plan import PruningPlan, targets_of
from hf_prune.planning.targets import refuse_read_only
from hf_prune.pruning.compute_masks import compute_masks_synced
from hf_prune.pruning.iterative import masks_before_repair, prune_iteratively
from hf_prune.pruning.learned_allocation import learn_sparsities
from hf_prune.pruning.mask_store import MaskStore, checked_masks, warn_regrown
from hf_prune.pruning.module_state import restores_modules
from hf_prune.pruning.polish import polish
from hf_prune.pruning.sequential import prune_sequentially
from hf_prune.pruning.transaction import WeightBackup
from hf_prune.structured.choose_units import make_unit_plan
from hf_prune.structured.prune_units import prune_units
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.utils.distributed import is_main_process
from hf_prune.utils.wrapping import sole_model, unwrapped

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
    cache_bytes: int = ...,
    polish_data: Batches | None = ...,
    **settings: Any,
) -> PruningPlan | UnitPlan: ...


@overload
def prune(
    model: Model,
    config: PruningConfig | float | None = ...,
    *,
    calibration: Batches | None = ...,
    keep_dense: bool = ...,
    dry_run: Literal[False] = ...,
    progress: bool = ...,
    cache_bytes: int = ...,
    polish_data: Batches | None = ...,
    **settings: Any,
) -> Model: ...


@restores_modules
def prune(
    model: Model,
    config: PruningConfig | float | None = None,
    *,
    calibration: Batches | None = None,
    keep_dense: bool = False,
    dry_run: bool = False,
    progress: bool = False,
    cache_bytes: int = CACHE_BYTES,
    polish_data: Batches | None = None,
    **settings: Any,
) -> Model | PruningPlan | UnitPlan:
    """Prune a model in place.

    Pruning again only ever adds zeros: 0.3 and then 0.5 removes 0.5 in all. That holds however a model is passed: the
    masks are those of its weights, and the same inside ``DataParallel``, a ``PeftModel``, any module that holds the
    model, or a part of it. Adapters are never pruned, nor the copies that ``modules_to_save`` trains.

    Where ``torch.distributed`` is initialised, as by ``accelerate.PartialState()``, calibration is shared: every
    process calls this with the same model and the same batches, runs its share of them, and gets the masks that one
    process would have found. An error in one is an error in all.

    Args:
        model: Any torch module; its weights become zero where they are removed.
        config: The settings, or just the sparsity.
        calibration: Batches, for criteria and repairs that need them; with labels for ``taylor`` and ``snip``.
            See :func:`hf_prune.text_batches` for unlabelled texts.
        keep_dense: Keep a copy of the dense weights, so that ``discard_masks`` can give them back.
        dry_run: Change nothing and return the plan. Sparsities that are learned from data are in it only if
            ``calibration`` is given.
        progress: Show a progress bar while calibrating; :func:`hf_prune.listen_to_progress` tells a function instead.
        cache_bytes: How much of what finished layers and the dense model put out is kept in memory in all; the rest
            goes to a temporary folder (``TMPDIR`` says where), as do the weights that an error would give back.
        polish_data: Batches for a polish, if more or others than ``calibration``; labels in them are not looked at.
            What it aims at is the model before this call: of one that was pruned before, the pruned one.
        **settings: Fields of :class:`PruningConfig`, in place of, or on top of, ``config``.

    Returns:
        The model, or the plan for ``dry_run``.

    Raises:
        ModelTypeError: If it is no model: its name, a config, a pipeline.
        ConfigError: If a setting is invalid.
        PlanError: If the settings do not fit the model.
        CalibrationError: If calibration data is missing or unusable.
        MaskError: If ``keep_dense`` is asked for after a pruning without it, or the masks of an earlier pruning no
            longer fit the model.

    Example:
        >>> import torch
        >>> model = prune(torch.nn.Linear(4, 4), 0.5)
        >>> int((model.weight == 0).sum())
        8
    """
    config = resolve_config(config, settings)
    _refuse_training(config, dry_run)
    if config.removes_units:
        return _prune_units(
            model, config, calibration, keep_dense, dry_run, progress and is_main_process(), cache_bytes, polish_data
        )
    wrapper, model = model, cast("Model", unwrapped(model))
    if polish_data is not None and config.polish is None:
        raise ConfigError("polish_data is given, but there is no polish: set polish='distill', or leave it out")
    plan = make_plan(model, config, masks=checked_masks(model))
    if dry_run and (calibration is None or not config.learns_allocation):
        return plan
    if not dry_run:
        refuse_read_only(model)
        warn_of(plan.notes)
    progress = progress and is_main_process()
    store = MaskStore.of(model) or MaskStore()
    warn_regrown(model, "they become zero now")
    if keep_dense:
        store.check_dense()
    with ExitStack() as context:
        sensitivity = None
        if config.learns_allocation:
            calibration = list(require_batches(plan.config, calibration))
            learned, sensitivity = learn_sparsities(model, plan, calibration, store.masks, progress, cache_bytes)
            if sensitivity is not None:
                context.callback(sensitivity.close)
            plan = make_plan(model, config, learned, masks=store.masks)
        if dry_run:
            return plan
        dense = None
        if config.polish is not None:  # recorded before anything changes
            if polish_data is None or plan.needs:
                calibration = list(require_batches(plan.config, calibration))
            batches = calibration if polish_data is None else list(require_batches(plan.config, polish_data))
            assert batches is not None
            cache_bytes //= 2  # one half for the polish, one for the pruning
            dense = context.enter_context(DenseOutputs(model, targets_of(plan), batches, cache_bytes, progress))
        given = None
        if config.repair is not None and (config.scope == "global" or plan.needs & CURVATURE):
            calibration = list(require_batches(plan.config, calibration))
            given = masks_before_repair(model, plan, calibration, store.masks, progress, cache_bytes)
        undo = context.enter_context(WeightBackup(model, in_memory=keep_dense or store.dense is not None))
        if plan.needs & INPUTS and config.calibration_order == "sequential":
            masks = prune_sequentially(
                model, plan, calibration, store.masks, undo, progress, cache_bytes, sensitivity, given
            )
        elif given is None and (plan.needs & CURVATURE or config.steps > 1):
            masks = prune_iteratively(model, plan, calibration, store.masks, undo, progress, cache_bytes)
        else:
            stats = collect_stats(model, plan, calibration, progress)
            masks, weights = compute_masks_synced(model, plan, stats, store.masks, given)
            masks = _with_followers(model, config, masks)
            if dense is None:
                store.update(model, masks, weights, config, keep_dense)
                return wrapper
            undo.write(masks, weights)
        masks = _with_followers(model, config, masks)
        record = None
        if dense is not None:
            kept = {name: mask & store.masks.get(name, mask).to(mask.device) for name, mask in masks.items()}
            record = polish(model, {**store.masks, **kept}, dense, undo, config, progress)
        if record is not None:
            store.polishes = (*store.polishes, record)
        store.update(model, masks, {}, config, keep_dense, undo.dense)
    return wrapper


def _prune_units(
    model: Model,
    config: PruningConfig,
    calibration: Batches | None,
    keep_dense: bool,
    dry_run: bool,
    progress: bool,
    cache_bytes: int,
    polish_data: Batches | None,
) -> Model | UnitPlan:
    """:func:`prune` for heads, neurons and layers."""
    inner = sole_model(model)
    if polish_data is not None and config.polish is None:
        raise ConfigError("polish_data is given, but there is no polish: set polish='distill', or leave it out")
    if dry_run:
        return make_unit_plan(inner, config, calibration, progress, cache_bytes)
    refuse_read_only(inner)
    prune_units(
        inner,
        config,
        calibration=calibration,
        keep_dense=keep_dense,
        progress=progress,
        cache_bytes=cache_bytes,
        polish_data=polish_data,
    )
    return model


def _refuse_training(config: PruningConfig, dry_run: bool) -> None:
    if config.schedule is not None and not dry_run:
        raise ConfigError(
            f"schedule={config.schedule!r} is for a training: give it to a PruningTrainer, or leave it out to prune now"
        )
    if config.learns_in_training and not dry_run:
        raise ConfigError(
            f"criterion {config.criterion!r} watches a training: give it to a PruningTrainer, or choose another one"
        )


def _with_followers(model: nn.Module, config: PruningConfig, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks, and of convolutions those of the norms and depthwise convolutions that come after them."""
    return (
        propagate_channel_masks(masks, find_channel_groups(model), model)
        if config.granularity == "channel"
        else dict(masks)
    )


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
