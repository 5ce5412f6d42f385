"""Rank units by the gradients of their gates, which are carried down with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.calibration.batches import count_examples, without_labels
from hf_prune.calibration.descent import Descent
from hf_prune.calibration.gradients import no_parameter_gradients
from hf_prune.calibration.input_reader import InputReader
from hf_prune.calibration.output_head import HeadFinder
from hf_prune.calibration.sensitivity import run_backwards
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.conversion.streaming.lazy_weights import LazyWeights
from hf_prune.conversion.streaming.meta_model import MetaModel, explaining_meta_errors
from hf_prune.criteria.base import derived_seed
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.targets import resolve_targets
from hf_prune.structured.gate_statistics import Gates, GateStatistics
from hf_prune.structured.loss_curves import Curve
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.structured.unit_scores import gate_curve, warn_of_missed_experts

Batches = Sequence[Mapping[str, Any]]


def gate_curves(
    meta_model: MetaModel,
    plan: UnitPlan,
    batches: Batches,
    journal: Journal,
    cache_bytes: int,
    progress: bool | None = None,
) -> dict[str, Curve]:
    """The curves of the groups of a plan by the gradients of their gates; arguments as of :func:`unit_curves`.

    Raises:
        CalibrationError: If the batches are unusable.
        PlanError: If the gradients of the model cannot be carried down block by block.
    """
    for record in journal.records:
        if "curves" in record:
            return {name: Curve(torch.tensor(o), torch.tensor(v).double()) for name, (o, v) in record["curves"].items()}
    model, config = meta_model.model, plan.config
    curves: dict[str, Curve] = {}
    missed: dict[str, tuple[int, ...]] = {}
    lazy = LazyWeights(meta_model, meta_model.read, meta_model.read_rows)

    def add(group: UnitGroup, found: GateStatistics) -> None:
        missed[group.name] = found.missed
        if found.missed:  # ranked by magnitude
            lazy.hold(piece.name for piece in group.slices)
        curves[group.name] = gate_curve(model, group, found, config.criterion)
        lazy.release()

    meta_model.load_buffers()
    inputs = [without_labels(model, batch) if isinstance(batch, Mapping) else batch for batch in batches]
    consumers = {piece.name for group in plan.sites for piece in group.consumers}
    targets = [
        t for t in resolve_targets(model, PruningConfig(target_modules=".*"), loaded=False) if t.name in consumers
    ]
    gates = Gates(model, plan.sites, pairs=config.criterion == "fisher")
    with explaining_meta_errors(model), lazy, no_parameter_gradients(model):
        with InputReader(model, targets, inputs, cache_bytes=cache_bytes, folder=journal.scratch) as reader:
            reader.order(warn=False)
            descent = Descent(reader, cache_bytes, journal.scratch)
            find_head = HeadFinder(model, reader.forward)
            for stage in descent.stages(progress, "Units"):
                names = {target.name for target in stage.targets}
                groups = [group for group in plan.sites if any(piece.name in names for piece in group.consumers)]
                examples = 0
                with ExitStack() as hooks:
                    gates.install(groups, hooks)
                    for index, calls in stage.batches():
                        generator = torch.Generator().manual_seed(derived_seed(config.seed, index))
                        for call in calls:
                            head = find_head(call.window)
                            with gates.reading(call.window):
                                call.run(partial(run_backwards, reader, call.window, head, generator))
                            examples += count_examples(call.window)
                for group, found in zip(groups, gates.statistics(groups, examples).values(), strict=True):
                    add(group, found)
    warn_of_missed_experts(missed, sum(max(1, group.choices) for group in plan.sites))
    journal.add({"curves": {name: [c.order.tolist(), c.losses.tolist()] for name, c in curves.items()}})
    return curves
