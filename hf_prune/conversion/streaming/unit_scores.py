"""Score the units of a checkpoint with one block in memory at a time: by what its routers do, or by its weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from hf_prune.architectures.moe_block import MoeBlock
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.calibration.batches import without_labels
from hf_prune.calibration.input_reader import InputReader
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.conversion.streaming.lazy_weights import LazyWeights
from hf_prune.conversion.streaming.meta_model import MetaModel, explaining_meta_errors
from hf_prune.conversion.streaming.runner import Batches
from hf_prune.kernels.matrix import Target
from hf_prune.planning.make_plan import refuse_infinite
from hf_prune.structured.routing import (
    Routing,
    blocks_by_group,
    module_around,
    new_sums,
    routing_of,
    routing_watchers,
)
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.structured.unit_scores import random_scores, squared_weights, warn_of_unused_experts
from hf_prune.utils.progress import Bar


def score_units(
    meta_model: MetaModel,
    plan: UnitPlan,
    batches: Batches,
    journal: Journal,
    cache_bytes: int,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """The scores of the units of each group by routers, weights or chance, as with the whole model in memory.

    Args:
        meta_model: The model.
        plan: Its plan, with nothing chosen yet.
        batches: Mappings of model inputs, for criteria that learn from them.
        journal: Keeps the scores of each group, for a run that goes on.
        cache_bytes: Most bytes of block outputs that are kept in memory; the others go to the folder of the journal.
        progress: Show a progress bar.

    Returns:
        (units,) by group, or (choices, units).

    Raises:
        CalibrationError: If the batches are unusable, or no token comes to a block.
        PlanError: If the model cannot run block by block, or a weight is not finite.
    """
    model, config = meta_model.model, plan.config
    if config.criterion == "random":
        return {group.name: random_scores(model, group, config.seed) for group in plan.sites}
    scores: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    for record in journal.records:
        for kept, found in (("scores", scores), ("tokens", tokens)):
            found |= {name: torch.tensor(values).double() for name, values in record.get(kept, {}).items()}

    def add(group: UnitGroup, values: Tensor, seen: Tensor | None = None) -> None:
        record = {"scores": {group.name: values.tolist()}}
        scores[group.name] = values.double()
        if seen is not None:
            tokens[group.name] = seen
            record["tokens"] = {group.name: seen.tolist()}
        journal.add(record)

    groups = [group for group in plan.sites if group.name not in scores]
    if config.learns_units and groups:
        observe = _observe_by_blocks(meta_model, plan, batches, cache_bytes, journal.scratch, set(scores), progress)
        for group, routing in observe:
            add(group, routing.reap if config.criterion == "reap" else routing.frequency, routing.tokens)
    elif groups:
        lazy = LazyWeights(meta_model, finite_weights(meta_model, groups), meta_model.read_rows)
        for group in Bar(groups, desc="Experts", progress=progress):
            own = group.own_parameters(model, range(group.units)) if group.lists else []
            lazy.hold([*(piece.name for piece in group.slices), *(name for names in own for name in names)])
            add(group, squared_weights(model, group))
        lazy.release()
    if config.criterion == "reap":
        warn_of_unused_experts(model, plan.sites, tokens)
    return scores


def finite_weights(meta_model: MetaModel, groups: Sequence[UnitGroup]) -> Callable[[str], Tensor]:
    """Reads parameters, and refuses those of some groups if they are not finite, once for each."""
    unchecked = {piece.name for group in groups for piece in group.slices}

    def read(name: str) -> Tensor:
        weight = meta_model.read(name)
        if name in unchecked:
            refuse_infinite([(name, weight)])
            unchecked.discard(name)
        return weight

    return read


class _MixtureReader(InputReader):
    """Runs batches block by block, where a block is finished once the mixtures of experts in it are.

    Args:
        model: The model.
        mixtures: Those that are looked at.
        batches: Mappings of model inputs.
        cache_bytes: Most bytes of block outputs that are kept in memory.
        folder: Where the others go.
    """

    def __init__(
        self,
        model: nn.Module,
        mixtures: Sequence[MoeBlock],
        batches: Batches,
        cache_bytes: int,
        folder: str | os.PathLike[str],
    ) -> None:
        routers = {block.router: module_around(block) for block in mixtures}
        shapes = {name: tuple(model.get_parameter(name).shape) for name in routers}
        targets = [Target(name, module, "linear", shapes[name]) for name, module in routers.items()]
        super().__init__(model, targets, batches, cache_bytes=cache_bytes, folder=folder)
        # A router may multiply without being called; the module around it and its experts is called in any case.
        self.places = self.holders = {name: [model.get_submodule(module)] for name, module in routers.items()}


def _observe_by_blocks(
    meta_model: MetaModel,
    plan: UnitPlan,
    batches: Batches,
    cache_bytes: int,
    folder: str | os.PathLike[str],
    done: set[str],
    progress: bool | None,
) -> Iterator[tuple[UnitGroup, Routing]]:
    """What the routers of the dense model do, block by block: :func:`observe_routing` with one block in memory.

    Nothing is removed on the way, so a block is observed and what it returns is recorded in the same pass.

    Args:
        meta_model: The model.
        plan: With the groups of experts.
        batches: Mappings of model inputs.
        cache_bytes: Most bytes of block outputs that are kept in memory.
        folder: Where the others go.
        done: Groups that were observed before, of whose blocks only the outputs are computed.
        progress: Show a progress bar.
    """
    model, blocks = meta_model.model, blocks_by_group(meta_model.model)
    groups = {blocks[group.name].router: group for group in plan.sites}
    inputs = [without_labels(model, batch) if isinstance(batch, Mapping) else batch for batch in batches]
    meta_model.load_buffers()
    reader = _MixtureReader(model, [blocks[group.name] for group in plan.sites], inputs, cache_bytes, folder)
    weights = LazyWeights(meta_model, finite_weights(meta_model, plan.sites), meta_model.read_rows, skip_head=True)

    def observe(group: UnitGroup, is_last: bool) -> Routing:
        sums = new_sums(group)
        watchers = routing_watchers(model, group, blocks[group.name], reader.padding, sums)
        reader.run(watchers, range(len(inputs)), progress=False, record=not is_last)
        return routing_of(group, sums)

    with ExitStack() as context:
        context.enter_context(explaining_meta_errors(model))
        context.enter_context(reader)
        lazy = context.enter_context(weights)
        targets = [target for step in reader.order(warn=False) for target in step]
        for number, target in enumerate(Bar(targets, desc="Experts", unit="block", progress=progress)):
            group, is_last = groups[target.name], number + 1 == len(targets)
            reader.finish([target])
            if group.name in done:
                continue
            stack, layer = blocks[group.name].layer
            lazy.hold(name for name in lazy.names.values() if name.startswith(f"{stack}.{layer}."))
            yield group, reader.repeated(partial(observe, group, is_last))
