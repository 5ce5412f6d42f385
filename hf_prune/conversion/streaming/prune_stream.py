"""prune_stream(): prune a checkpoint larger than the memory, tensor by tensor or block by block."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hf_prune import __version__
from hf_prune.calibration.batches import NO_BATCHES, Batches, require_batches
from hf_prune.calibration.input_reader import CACHE_BYTES
from hf_prune.checkpoint.files import MASK_FILE, find_file
from hf_prune.checkpoint.mask_file import StoredMasks
from hf_prune.checkpoint.shards import Shards
from hf_prune.checkpoint.sources import check_model_source
from hf_prune.conversion.streaming.blocks import learned_sparsities, measure_gradients, prune_blocks
from hf_prune.conversion.streaming.fisher_stream import find_by_fisher
from hf_prune.conversion.streaming.global_threshold import global_threshold
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.conversion.streaming.lazy_weights import LazyWeights
from hf_prune.conversion.streaming.meta_model import MetaModel, load_meta_model
from hf_prune.conversion.streaming.output import COPIED, Output
from hf_prune.conversion.streaming.placing import finish_placing, is_placing
from hf_prune.conversion.streaming.prune_units_stream import prepare_units, remove_units
from hf_prune.conversion.streaming.streamable import check_streamable
from hf_prune.conversion.streaming.weight_gradients import WeightGradients
from hf_prune.criteria.base import CURVATURE, GRADIENTS, INPUTS, WeightStats, derived_seed
from hf_prune.errors import CalibrationError, CheckpointError
from hf_prune.evaluation.sparsity_report import SparsityReport
from hf_prune.kernels.fast_products import fast_products
from hf_prune.kernels.selection import keep_above
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.expectations import warn_of_magnitude
from hf_prune.planning.make_plan import make_plan, warn_of
from hf_prune.planning.plan import PlannedTensor, PruningPlan
from hf_prune.planning.resolve import resolve_config
from hf_prune.pruning.compute_masks import unit_chunks
from hf_prune.pruning.mask_fit import check_fit
from hf_prune.pruning.selector import spread_units
from hf_prune.pruning.sequential import prune_tensor
from hf_prune.pruning.weight_norm import effective_weight, keeps_values, largest_of_slices, lengths_left, lengths_name
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.utils.digests import batches_digest
from hf_prune.utils.folders import refuse_links
from hf_prune.utils.forward import without_autocast
from hf_prune.utils.locks import writes_alone
from hf_prune.utils.output_folder import check_output
from hf_prune.utils.progress import Bar


@writes_alone("prune")
def prune_stream(
    source: str | os.PathLike[str],
    config: PruningConfig | float | None,
    out: str | os.PathLike[str],
    *,
    calibration: Batches | None = None,
    progress: bool | None = None,
    cache_bytes: int = CACHE_BYTES,
    restart: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> SparsityReport:
    """Prune a checkpoint into a folder without ever holding its model.

    The result is the same as loading the model, pruning it and saving it: the same masks, in the same safetensors files
    as those of the source. Criteria without data read one weight at a time. Criteria that learn from inputs run the
    batches through one block at a time, like :func:`hf_prune.prune` with ``calibration_order="sequential"``; that takes
    the memory of the largest block, of the statistics of one input, and ``cache_bytes``. For ``objective="loss"``,
    ``allocation="fisher"`` and criteria that need gradients of weights, the gradient is carried down from block to
    block; what every block returns for every batch is then in the hidden folder for a while, and for such criteria the
    gradients of all weights.

    Heads, neurons, experts and layers are cut out as by ``shrink()``: the same ones stay as in memory, files have
    smaller tensors, and the config counts what is left. Each block is observed, weighed, or repaired, alone.

    Nothing appears at ``out`` before it is complete. An interrupted run leaves a hidden folder beside it, from which
    the same call continues: nothing is pruned twice, and the result has the same bits.

    Args:
        source: Folder or Hub id of a checkpoint in safetensors files. Masks of an earlier pruning are kept.
        config: The settings, or just the sparsity. As in :func:`hf_prune.prune`, the preset is ``"balanced"`` where
            there is ``calibration`` and nothing names a method.
        out: The folder to write: new, empty, or an earlier output.
        calibration: Batches for criteria and repairs that learn from data; see :func:`hf_prune.text_batches`. Only
            ``taylor`` and ``snip`` need labels.
        progress: Show a progress bar.
        cache_bytes: Most bytes of block outputs kept in memory; the others go to the hidden folder.
        restart: Start again, and discard what an interrupted run left.
        overwrite: Replace existing files in ``out``.
        **settings: Fields of :class:`PruningConfig`, instead of ``config`` or to change it.

    Returns:
        The sparsity report of the pruned checkpoint, counted while it was written; the folder has it as
        ``sparsity_report.json``.

    Raises:
        ConfigError: If a setting is invalid, or needs the whole model at once.
        PlanError: If the settings do not fit the model, or it cannot be run block by block.
        CalibrationError: If calibration data is missing or unusable.
        CheckpointError: If the source is damaged, does not fit its config or has no safetensors files, or if an
            interrupted run with other settings or something else is in the way. ``out`` is then unchanged.
        DataError: If the source cannot be found.

    Example:
        >>> prune_stream("large-model", 0.5, "pruned", criterion="magnitude")  # doctest: +SKIP
    """
    config = resolve_config(config, settings, has_data=calibration is not None)
    source, out = os.fspath(source), Path(out)
    check_streamable(config)
    journal = Journal(out)
    if not (placing := is_placing(journal)):  # the interrupted run has checked it
        check_output(out, "prune", [source], overwrite=overwrite)
    batches: list[Mapping[str, Any]] = []
    if config.needs_data:
        batches = _batches(config, calibration)
    key = {
        "path": os.path.abspath(source) if os.path.isdir(source) else source,
        "settings": json.dumps(config.to_dict(), sort_keys=True),
        "calibration data": batches_digest(batches),
        "version": __version__,
    }
    if not restart:
        journal.check(key)
        if placing:
            return finish_placing(journal, out, overwrite)
    if config.removes_units:
        meta_model, unit_plan = prepare_units(source, config)
        if placing:
            finish_placing(journal, out, overwrite)
        journal.begin({**key, **_fingerprints(source, meta_model)}, restart)
        with without_autocast(), fast_products(meta_model.stand_ins()):
            return remove_units(
                source, meta_model, unit_plan, batches, journal, out,
                cache_bytes=cache_bytes, overwrite=overwrite, progress=progress,
            )  # fmt: skip
    meta_model, plan, previous_masks = _prepare(source, config)
    warn_of(plan.notes)
    warn_of_magnitude(plan.model_name, config)
    if placing:
        finish_placing(journal, out, overwrite)
    journal.begin({**key, **_fingerprints(source, meta_model)}, restart)
    output = Output(meta_model, plan, previous_masks, journal)
    if not output.is_sound():  # the files of the interrupted run were changed
        journal.begin(journal.key, restart=True)
        output = Output(meta_model, plan, previous_masks, journal)
    with ExitStack() as resources:
        if config.needs_data:  # as in memory, for the same bits
            resources.enter_context(without_autocast())
            resources.enter_context(fast_products(meta_model.stand_ins()))
        sensitivity = None
        if config.learns_allocation:
            sparsities, sensitivity = learned_sparsities(output, batches, cache_bytes, progress)
            if sensitivity is not None:
                resources.callback(sensitivity.close)
            plan = make_plan(meta_model.model, config, sparsities, loaded=False, masks=previous_masks)
            output = Output(meta_model, plan, previous_masks, journal)
        gradients = None
        if config.needs & GRADIENTS:
            gradients = measure_gradients(output, plan, batches, cache_bytes, progress)
            resources.callback(gradients.close)
        output.copy_rest()
        masks = None
        if config.needs & CURVATURE:
            masks = find_by_fisher(output, plan, batches, cache_bytes, progress)
        if config.needs & INPUTS:
            prune_blocks(output, plan, batches, cache_bytes, sensitivity, gradients, masks, progress)
        elif masks is None:
            _prune_tensors(output, plan, gradients, progress)
        return output.finish(source, out, overwrite)


def plan_stream(source: str | os.PathLike[str], config: PruningConfig) -> PruningPlan | UnitPlan:
    """The plan of :func:`prune_stream`, made without reading any weight.

    Returns:
        The plan. Of heads, neurons and experts it says how many stay in scope layer, and leaves open which ones.

    Raises:
        ConfigError: If a setting needs the whole model at once.
        PlanError: If the settings do not fit the model.
        CheckpointError: If the source is damaged, or does not fit its config.
    """
    check_streamable(config)
    if config.removes_units:
        return prepare_units(os.fspath(source), config)[1]
    return _prepare(os.fspath(source), config)[1]


def _batches(config: PruningConfig, calibration: Batches | None) -> list[Mapping[str, Any]]:
    batches = list(require_batches(config, calibration))
    if not batches:
        raise CalibrationError(NO_BATCHES)
    return batches


def _prepare(source: str, config: PruningConfig) -> tuple[MetaModel, PruningPlan, Mapping[str, Tensor]]:
    if os.path.isdir(source):
        refuse_links(Path(source), COPIED)
    meta_model = load_meta_model(source)
    path = find_file(source, MASK_FILE, {"local_files_only": check_model_source(source)})
    masks: Mapping[str, Tensor] = MappingProxyType({}) if path is None else StoredMasks(path)
    parameters = dict(meta_model.model.named_parameters())
    for name in masks:
        if name not in parameters:
            raise CheckpointError(
                f"the masks of {source} do not fit the model: {name!r} has a mask, and the model has no such "
                f"parameter; delete {MASK_FILE} to prune without masks"
            )
    check_fit(meta_model.model, masks, ())
    return meta_model, make_plan(meta_model.model, config, loaded=False, masks=masks), masks


def _fingerprints(source: str, meta_model: MetaModel) -> dict[str, str]:
    """The fingerprints of the source's files, which an unfinished result was made from."""
    hub = {"local_files_only": check_model_source(source)}
    masks, config = find_file(source, MASK_FILE, hub), find_file(source, "config.json", hub)
    return {
        "weights": meta_model.shards.fingerprint(),
        "masks": "" if masks is None else Shards([masks]).fingerprint(),
        "config.json": "" if config is None else hashlib.sha256(Path(config).read_bytes()).hexdigest(),
    }


# --- weight by weight -------------------------------------------------------------------------------


@torch.no_grad()
def _prune_tensors(output: Output, plan: PruningPlan, gradients: WeightGradients | None, progress: bool | None) -> None:
    """Prune one weight at a time; in global scope, all weights are first read a few times to find the threshold."""
    model, lazy = output.meta_model.model, LazyWeights(output.meta_model, output.read, output.read_rows)
    threshold = None
    if plan.config.scope == "global":
        sources = [functools.partial(_scores, output, plan, gradients, tensor) for tensor in plan.tensors]
        threshold = global_threshold(output.journal, plan, sources)
    for i, tensor in enumerate(Bar(plan.tensors, desc="Pruning", unit="weight", progress=progress)):
        target = tensor.target
        if output.done(target.name):
            continue
        lengths = lengths_name(target.name)
        lazy.hold([target.name] if lengths is None else [target.name, lengths])
        new: Mapping[str, Tensor] = {}
        if threshold is None:
            stats = _stats(plan, tensor, gradients)
            mask, new = prune_tensor(model, plan, tensor, {}, output.previous_masks, stats, biases=output.biases)
        else:
            keep = keep_above(sources[i], tensor.units, threshold[0], threshold[1][i])
            mask = target.native(spread_units(plan, target, keep))
            new = lengths_left(plan, target.name, mask, output.previous_masks, lazy.__getitem__)
        output.write(tensor, lazy[target.name], mask, new)
    lazy.release()


def _scores(
    output: Output, plan: PruningPlan, gradients: WeightGradients | None, tensor: PlannedTensor
) -> Iterator[Tensor]:
    """Read one weight, and compute the scores of its units in chunks."""
    target = tensor.target
    old = output.previous_masks.get(target.name)
    weight = values = output.read(target.name)
    last = largest_of_slices(output.meta_model.model, target, weight)
    kept = None if old is None else target.matrix(old)
    if keeps_values(plan):
        values = effective_weight(target.name, lambda name: weight if name == target.name else output.read(name))
    return unit_chunks(plan, target, target.matrix(values), _stats(plan, tensor, gradients), kept, last)


def _stats(plan: PruningPlan, tensor: PlannedTensor, gradients: WeightGradients | None) -> WeightStats:
    name = tensor.target.name
    return WeightStats(seed=derived_seed(plan.config.seed, name)) if gradients is None else gradients.stats(name)
