"""prune_stream(): prune a checkpoint larger than the memory, tensor by tensor or block by block."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from hf_prune import __version__
from hf_prune.calibration.batches import NO_BATCHES, Batches, require_batches
from hf_prune.calibration.input_reader import CACHE_BYTES
from hf_prune.checkpoint.files import MASK_FILE, find_file
from hf_prune.checkpoint.mask_file import StoredMasks
from hf_prune.checkpoint.shards import Shards
from hf_prune.checkpoint.sources import check_model_source
from hf_prune.conversion.streaming.blocks import prune_blocks
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.conversion.streaming.lazy_weights import LazyWeights
from hf_prune.conversion.streaming.meta_model import MetaModel, load_meta_model
from hf_prune.conversion.streaming.output import COPIED, Output
from hf_prune.conversion.streaming.placing import finish_placing, is_placing
from hf_prune.criteria.base import CURVATURE, GRADIENTS, INPUTS, TRAINED, WeightStats, derived_seed
from hf_prune.criteria.registry import CRITERIA
from hf_prune.errors import CalibrationError, CheckpointError, ConfigError
from hf_prune.evaluation.sparsity_report import SparsityReport
from hf_prune.kernels.selection import find_threshold, keep_above
from hf_prune.pipeline import resolve_config
from hf_prune.planning.choices import ALLOCATIONS, CALIBRATED_ALLOCATIONS
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan, warn_of
from hf_prune.planning.plan import PlannedTensor, PruningPlan
from hf_prune.planning.traits import removed_kinds
from hf_prune.pruning.compute_masks import unit_chunks
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.pruning.selector import spread_units
from hf_prune.pruning.sequential import prune_tensor
from hf_prune.pruning.weight_norm import effective_weight, largest_of_slices, lengths_left, lengths_name
from hf_prune.utils.digests import batches_digest
from hf_prune.utils.distributed import rank_and_world_size
from hf_prune.utils.folders import refuse_links
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
    progress: bool = False,
    cache_bytes: int = CACHE_BYTES,
    restart: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> SparsityReport:
    """Prune a checkpoint into a folder without ever holding its model.

    The result is the same as loading the model, pruning it and saving it: the same masks, in the same safetensors files
    as those of the source. Criteria without data read one weight at a time. Criteria that learn from inputs run the
    batches through one block at a time, like :func:`hf_prune.prune` with ``calibration_order="sequential"``; that takes
    the memory of the largest block, of the statistics of one input, and ``cache_bytes``.

    Nothing appears at ``out`` before it is complete. An interrupted run leaves a hidden folder beside it, from which
    the same call continues: nothing is pruned twice, and the result has the same bits.

    Args:
        source: Folder or Hub id of a checkpoint in safetensors files. Masks of an earlier pruning are kept.
        config: The settings, or just the sparsity.
        out: The folder to write: new, empty, or an earlier output.
        calibration: Batches for criteria and repairs that learn from inputs; see :func:`hf_prune.text_batches`.
            Labels are not needed.
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
    config = resolve_config(config, settings)
    source, out = os.fspath(source), Path(out)
    check_streamable(config)
    journal = Journal(out)
    if not (placing := is_placing(journal)):  # the interrupted run has checked it
        check_output(out, "prune", [source], overwrite=overwrite)
    batches: list[Mapping[str, Any]] = []
    if config.needs & INPUTS:
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
    meta_model, plan, previous_masks = _prepare(source, config)
    warn_of(plan.notes)
    if placing:
        finish_placing(journal, out, overwrite)
    journal.begin({**key, **_fingerprints(source, meta_model)}, restart)
    output = Output(meta_model, plan, previous_masks, journal)
    if not output.is_sound():  # the files of the interrupted run were changed
        journal.begin(journal.key, restart=True)
        output = Output(meta_model, plan, previous_masks, journal)
    output.copy_rest()
    if config.needs & INPUTS:
        prune_blocks(output, plan, batches, cache_bytes, journal.scratch, progress)
    else:
        _prune_tensors(output, plan, progress)
    return output.finish(source, out, overwrite)


def plan_stream(source: str | os.PathLike[str], config: PruningConfig) -> PruningPlan:
    """The plan of :func:`prune_stream`, made without reading any weight.

    Raises:
        ConfigError: If a setting needs the whole model at once.
        PlanError: If the settings do not fit the model.
        CheckpointError: If the source is damaged, or does not fit its config.
    """
    check_streamable(config)
    return _prepare(os.fspath(source), config)[1]


def check_streamable(config: PruningConfig) -> None:
    """Make sure that the settings do not need the whole model in memory.

    Raises:
        ConfigError: If they do.
    """
    if removed_kinds(config):
        raise ConfigError(
            f"granularity {config.granularity} needs the whole model in memory: expected 'unstructured', N:M or "
            f"'block:RxC', or prune without streaming"
        )
    if config.learns_in_training or config.schedule is not None:
        raise ConfigError(
            f"criterion {config.criterion!r} and schedule={config.schedule!r}: streaming does not train; expected "
            f"another criterion and no schedule"
        )
    if config.needs & GRADIENTS:
        supported = [
            name for name in CRITERIA.names() if not CRITERIA.get(name).needs & (GRADIENTS | CURVATURE | TRAINED)
        ]
        raise ConfigError(
            f"criterion {config.criterion!r} needs gradients, which need the whole model in memory: expected one of "
            f"{', '.join(supported)}; or prune without streaming"
        )
    if config.needs & CURVATURE or config.polish is not None:
        who = f"criterion {config.criterion!r}" if config.needs & CURVATURE else "polish"
        raise ConfigError(
            f"{who} needs gradients, which need the whole model in memory: leave it out, or prune without streaming"
        )
    if config.repair is not None and config.scope == "global":
        raise ConfigError(
            f"repair={config.repair!r} with scope='global' needs all masks before the first repair: use scope 'layer' "
            f"or 'row', or prune without streaming"
        )
    if config.learns_allocation:
        supported = [name for name in ALLOCATIONS if name not in CALIBRATED_ALLOCATIONS]
        raise ConfigError(
            f"allocation={config.allocation!r} needs the whole model in memory: expected one of "
            f"{', '.join(supported)}, or a sparsity for each module; or prune without streaming"
        )
    if config.objective != "layer":
        raise ConfigError(
            f"objective={config.objective!r} needs gradients, which need the whole model in memory: expected 'layer'; "
            f"or prune without streaming"
        )
    if config.needs & INPUTS and config.calibration_order != "sequential":
        raise ConfigError(
            f"calibration_order={config.calibration_order!r} needs the statistics of all weights at once: expected "
            f"'sequential'; or prune without streaming"
        )
    if (count := rank_and_world_size()[1]) > 1:
        raise ConfigError(f"found {count} processes: expected one, since streaming writes one output")


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
    MaskStore(cast("dict[str, Tensor]", masks)).check(meta_model.model)
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


# --- without data ----------------------------------------------------------------------------------


@torch.no_grad()
def _prune_tensors(output: Output, plan: PruningPlan, progress: bool) -> None:
    """Prune one weight at a time; in global scope, all weights are first read a few times to find the threshold."""
    model, lazy = output.meta_model.model, LazyWeights(output.meta_model, output.read, output.read_rows)
    threshold = _global_threshold(output, plan) if plan.config.scope == "global" else None
    for i, tensor in enumerate(Bar(plan.tensors, desc="Pruning", unit="weight", progress=progress)):
        target = tensor.target
        if output.done(target.name):
            continue
        lengths = lengths_name(target.name)
        lazy.hold([target.name] if lengths is None else [target.name, lengths])
        new: Mapping[str, Tensor] = {}
        if threshold is None:
            mask, new = prune_tensor(model, plan, tensor, {}, output.previous_masks, biases=output.biases)
        else:
            scores = functools.partial(_scores, output, plan, tensor)
            keep = keep_above(scores, tensor.units, threshold[0], threshold[1][i])
            mask = target.native(spread_units(plan, target, keep))
            new = lengths_left(plan, target.name, mask, output.previous_masks, lazy.__getitem__)
        output.write(tensor, lazy[target.name], mask, new)
    lazy.release()


def _global_threshold(output: Output, plan: PruningPlan) -> tuple[float, list[int]]:
    """The score above which units are kept, and for each weight the number of kept units with exactly that score."""
    for record in output.journal.records:
        if "cut" in record:
            return record["cut"], record["ties"]
    scores = [functools.partial(_scores, output, plan, tensor) for tensor in plan.tensors]
    threshold, ties = find_threshold(scores, [tensor.units for tensor in plan.tensors], plan.remove)
    output.journal.add({"cut": threshold, "ties": ties})
    return threshold, ties


def _scores(output: Output, plan: PruningPlan, tensor: PlannedTensor) -> Iterator[Tensor]:
    """Read one weight, and compute the scores of its units in chunks."""
    target = tensor.target
    old = output.previous_masks.get(target.name)
    weight = output.read(target.name)
    last = largest_of_slices(output.meta_model.model, target, weight)
    stats = WeightStats(seed=derived_seed(plan.config.seed, target.name))
    kept = None if old is None else target.matrix(old)
    values = effective_weight(target.name, lambda name: weight if name == target.name else output.read(name))
    return unit_chunks(plan, target, target.matrix(values), stats, kept, last)
