"""prune(): plan, compute masks, repair, polish; all of it or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal, TypeVar, cast, overload

from torch import Tensor, nn

from hf_prune.architectures.kinds.channel import find_channel_groups, propagate_channel_masks
from hf_prune.architectures.switched_off import layers_without_units
from hf_prune.calibration.batches import Batches, needed_batches, require_batches
from hf_prune.calibration.dense_outputs import DenseOutputs
from hf_prune.calibration.input_reader import CACHE_BYTES
from hf_prune.calibration.read import CalibrationData, read_calibration
from hf_prune.checkpoint.target_size import with_target_size
from hf_prune.criteria.base import CURVATURE, GRADIENTS, INPUTS, LABELLED
from hf_prune.errors import ConfigError, PlanError
from hf_prune.kernels.fast_products import fast_products
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.expectations import note_expectation, warn_of_magnitude
from hf_prune.planning.make_plan import make_plan, warn_of
from hf_prune.planning.plan import PruningPlan, targets_of
from hf_prune.planning.resolve import resolve_config
from hf_prune.planning.signature import with_settings
from hf_prune.pruning.iterative import prune_iteratively
from hf_prune.pruning.learned_allocation import learn_sparsities
from hf_prune.pruning.mask_store import checked_masks, warn_regrown
from hf_prune.pruning.module_state import restores_modules
from hf_prune.pruning.one_pass import prune_in_one_pass
from hf_prune.pruning.polish import polish
from hf_prune.pruning.run import CalibrationRun, MemoryBudget, Strategy
from hf_prune.pruning.sequential import prune_sequentially
from hf_prune.pruning.transaction import Transaction, check_changeable
from hf_prune.structured.prune_units import plan_units, prune_units, trained_plan
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.utils.distributed import fail_together, is_main_process
from hf_prune.utils.forward import without_autocast
from hf_prune.utils.offloaded_weights import is_offloaded
from hf_prune.utils.wrapping import sole_model, uncompiled, unwrapped

Model = TypeVar("Model", bound=nn.Module)


@overload
def prune(
    model: nn.Module,
    config: PruningConfig | float | None = ...,
    *,
    calibration: CalibrationData | None = ...,
    keep_dense: bool = ...,
    dry_run: Literal[True],
    progress: bool | None = ...,
    cache_bytes: int = ...,
    polish_data: CalibrationData | None = ...,
    tokenizer: Any = ...,
    target_size: int | str | None = ...,
    **settings: Any,
) -> PruningPlan | UnitPlan: ...


@overload
def prune(
    model: Model,
    config: PruningConfig | float | None = ...,
    *,
    calibration: CalibrationData | None = ...,
    keep_dense: bool = ...,
    dry_run: Literal[False] = ...,
    progress: bool | None = ...,
    cache_bytes: int = ...,
    polish_data: CalibrationData | None = ...,
    tokenizer: Any = ...,
    target_size: int | str | None = ...,
    **settings: Any,
) -> Model: ...


@with_settings
@restores_modules
def prune(
    model: Model,
    config: PruningConfig | float | None = None,
    *,
    calibration: CalibrationData | None = None,
    keep_dense: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
    cache_bytes: int = CACHE_BYTES,
    polish_data: CalibrationData | None = None,
    tokenizer: Any = None,
    target_size: int | str | None = None,
    **settings: Any,
) -> Model | PruningPlan | UnitPlan:
    """Prune a model in place.

    Pruning again only ever adds zeros: 0.3 and then 0.5 removes 0.5 in all. That holds however a model is passed: the
    masks are those of its weights, and the same inside ``DataParallel``, a ``PeftModel``, any module that holds the
    model, or a part of it. Adapters are never pruned, nor the copies that ``modules_to_save`` trains. Of a model of
    sentence-transformers, the transformers model inside is pruned, by its names, and what comes after it stays; one
    with several of them inside, such as a ``Router``, is pruned as a whole, projections included, by its own names.

    Where ``torch.distributed`` is initialised, as by ``accelerate.PartialState()``, calibration is shared: every
    process calls this with the same model and the same batches, runs its share of them, and gets the masks that one
    process would have found. An error in one is an error in all.

    Args:
        model: Any torch module; its weights become zero where they are removed.
        config: The settings, or just the sparsity.
        calibration: Data for criteria and repairs that need it: a list of texts (or pairs of texts, images, sounds), a
            ``datasets.Dataset`` (of more than 512 rows, 512 drawn at random), a ``DataLoader``, one batch, or batches:
            dicts of the model's inputs. Criteria such as ``taylor`` and ``snip`` need labels too: a column ``label`` or
            ``labels``; those of a causal language model are its texts.
        keep_dense: Keep a copy of the dense weights, so that ``discard_masks`` can give them back.
        dry_run: Change nothing and return the plan. Sparsities that are learned from data are in it only if
            ``calibration`` is given.
        progress: Show a progress bar while calibrating; :func:`hf_prune.listen_to_progress` tells a function instead.
        cache_bytes: How many bytes of the outputs of finished layers and of the dense model stay in memory; the rest
            goes to a temporary folder, as do the weights that an error would give back: in that of the system, or where
            ``TMPDIR`` says; if the system's lies in memory, in ``/var/tmp`` or the user's cache.
        polish_data: The same for a polish, if more or others than ``calibration``; labels in it are not looked at.
            What it aims at is the model before this call: of one that was pruned before, the pruned one.
        tokenizer: The tokenizer or processor that reads ``calibration``; by default the one in the folder that the
            model was loaded from.
        target_size: In place of a sparsity: the largest size of the file that the model is saved to, in bytes or as
            ``"30MB"``. Where weights become zeros, that is what ``save_pretrained(compressed=True)`` writes; where
            heads, neurons or layers go, the plain file after ``shrink()``.
        **settings: Fields of :class:`PruningConfig` and ``preset``, in place of, or on top of, ``config``. Where no
            method is named, the preset is ``"balanced"`` with calibration data, and ``"fast"`` without.

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
    if target_size is not None and (not isinstance(config, PruningConfig | None) or "sparsity" in settings):
        raise ConfigError("sparsity and target_size are both set, and each decides how much goes: leave one out")
    is_complete, has_data = isinstance(config, PruningConfig), calibration is not None
    config = resolve_config(config, settings, has_data=has_data)
    _check_usable(config, polish_data, dry_run)
    inner = cast("nn.Module", sole_model(model) if config.removes_units else unwrapped(model))
    if not dry_run:
        check_changeable(inner, keep_dense)
    _refuse_gradients_of_offloaded(inner, config)
    if config.needs_data:
        with fail_together():
            labels = bool(config.needs & LABELLED)
            calibration = read_calibration(model, calibration, tokenizer, labels=labels)
            polish_data = read_calibration(model, polish_data, tokenizer)
    if target_size is not None:
        config = with_target_size(inner, config, target_size)
    with ExitStack() as resources:
        resources.enter_context(uncompiled())
        if config.needs_data and not dry_run:
            resources.enter_context(without_autocast())
            resources.enter_context(fast_products(inner.parameters()))
        plan = plan_units if config.removes_units else _plan_weights
        memory = MemoryBudget.split(cache_bytes, config)
        run = plan(inner, config, calibration, polish_data, dry_run, progress and is_main_process(), memory)
        if run.sensitivity is not None:
            resources.callback(run.sensitivity.close)
        if dry_run:
            return run.plan
        warn_regrown(inner, "they become zero now")
        if not is_complete:
            note_expectation(config, settings, has_data=has_data)
        with Transaction(inner, keep_dense) as change:
            teacher = None
            if config.polish is not None:
                teacher = resources.enter_context(_record_dense(run, polish_data))
            masks, weights = strategy_for(run.plan)(run, change)
            change.write(_with_followers(inner, config, masks), weights, at_once=teacher is not None)
            if teacher is not None:
                change.record(polish(run, teacher, change))
            change.commit(config)
    return model


def strategy_for(plan: PruningPlan | UnitPlan) -> Strategy:
    """Choose how the masks of a plan are computed, and its weights repaired.

    Returns:
        * :func:`prune_units`, where heads, neurons and layers are removed;
        * :func:`prune_sequentially`, where something learns from the inputs of layers, and each layer is to see those
          that the pruned layers before it give;
        * :func:`prune_iteratively`, where gradients are taken again after each step, or blocks of the Fisher matrix
          are too large to be held for all weights;
        * :func:`prune_in_one_pass` otherwise.
    """
    if isinstance(plan, UnitPlan):
        return prune_units
    if plan.needs & INPUTS and plan.config.calibration_order == "sequential":
        return prune_sequentially
    if plan.config.repair is None and (plan.needs & CURVATURE or plan.config.steps > 1):
        return prune_iteratively
    return prune_in_one_pass


def _plan_weights(
    model: nn.Module,
    config: PruningConfig,
    calibration: Batches | None,
    polish_data: Batches | None,
    dry_run: bool,
    progress: bool | None,
    memory: MemoryBudget,
) -> CalibrationRun[PruningPlan]:
    """Plan which weights are removed; see :func:`plan_units` for heads, neurons and layers."""
    masks = checked_masks(model)
    if config.needs_data and (without := layers_without_units(model)):
        raise PlanError(
            f"experts are switched off in {', '.join(without)}, so calibration cannot tell by their numbers which of "
            f"them a token is sent to: call shrink() first, which removes them"
        )
    plan = make_plan(model, config, masks=masks)
    if not dry_run:
        warn_of(plan.notes)
        warn_of_magnitude(type(model).__name__, config)
    learns = config.learns_allocation and not (dry_run and calibration is None)
    batches = needed_batches(config, calibration, polish_data) if learns or not dry_run else None
    run = CalibrationRun(model, plan, memory, batches, masks, progress)
    if not learns:
        return run
    sparsities, sensitivity = learn_sparsities(run)
    try:
        plan = make_plan(model, config, sparsities, masks=masks)
    except BaseException:
        if sensitivity is not None:
            sensitivity.close()
        raise
    return dataclasses.replace(run, plan=plan, sensitivity=sensitivity)


def _refuse_gradients_of_offloaded(model: nn.Module, config: PruningConfig) -> None:
    """Refuse settings that take gradients, or train, where weights come and go while the model runs."""
    asked = {
        f"criterion {config.criterion!r}": bool(config.needs & (GRADIENTS | CURVATURE)),
        "objective 'loss'": config.objective == "loss",
        "allocation 'fisher'": config.allocation == "fisher",
        "a polish": config.polish is not None,
    }
    if (what := next((name for name, does in asked.items() if does), None)) is None:
        return
    if (name := next((name for name, _ in model.named_parameters() if is_offloaded(model, name)), None)) is not None:
        raise PlanError(
            f"{name} is offloaded, and {what} takes gradients, which need all weights at once: choose criterion "
            f"'magnitude', 'wanda' or 'sparsegpt' without it, or load the model without offloading, on devices with "
            f"room for all of it"
        )


def _record_dense(run: CalibrationRun[Any], polish_data: Batches | None) -> DenseOutputs:
    """The outputs that a polish aims at: those of the model as it is now."""
    plan = trained_plan(run) if isinstance(run.plan, UnitPlan) else run.plan
    batches = run.data if polish_data is None else list(require_batches(run.plan.config, polish_data))
    return DenseOutputs(run.model, targets_of(plan), batches, run.memory.polish, run.progress)


def _check_usable(config: PruningConfig, polish_data: Batches | None, dry_run: bool) -> None:
    """Refuse settings of a training, and data without a use."""
    if config.schedule is not None and not dry_run:
        raise ConfigError(
            f"schedule={config.schedule!r} is for a training: give it to a PruningTrainer, or leave it out to prune now"
        )
    if config.learns_in_training and not dry_run:
        raise ConfigError(
            f"criterion {config.criterion!r} watches a training: give it to a PruningTrainer, or choose another one"
        )
    if polish_data is not None and config.polish is None:
        raise ConfigError("polish_data is given, but there is no polish: set polish='distill', or leave it out")


def _with_followers(model: nn.Module, config: PruningConfig, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Masks, and for channels the masks of the norms and depthwise convolutions behind the pruned convolutions."""
    if config.granularity != "channel":
        return masks
    return propagate_channel_masks(masks, find_channel_groups(model), model)
