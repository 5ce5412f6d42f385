"""What removing units of a checkpoint costs, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.calibration.batches import count_examples, without_labels
from hf_prune.calibration.blockwise_sensitivity import measure_by_blocks
from hf_prune.calibration.descent import Descent
from hf_prune.calibration.gradients import no_parameter_gradients
from hf_prune.calibration.input_reader import InputReader
from hf_prune.calibration.output_head import HeadFinder
from hf_prune.calibration.sensitivity import Sensitivity, run_backwards
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.conversion.streaming.lazy_weights import LazyWeights
from hf_prune.conversion.streaming.meta_model import MetaModel, explaining_meta_errors
from hf_prune.conversion.streaming.runner import Batches
from hf_prune.conversion.streaming.unit_scores import finite_weights, score_units
from hf_prune.criteria.base import derived_seed
from hf_prune.errors import CalibrationError, PlanError
from hf_prune.planning.targets import every_target
from hf_prune.structured.gate_statistics import NO_UNITS, Gates, GateStatistics
from hf_prune.structured.loss_curves import Curve
from hf_prune.structured.reconstruction import (
    Reading,
    measured_targets,
    reconstruction_curves,
    redundancy_curves,
)
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.structured.unit_scores import curve_of_scores, gate_curve, warn_of_missed_experts


@torch.no_grad()
def unit_curves(
    meta_model: MetaModel,
    plan: UnitPlan,
    batches: Batches,
    journal: Journal,
    cache_bytes: int,
    progress: bool | None = None,
) -> tuple[dict[str, Curve], Sensitivity | None]:
    """What removing units of each group costs, the same as with the whole model in memory.

    Args:
        meta_model: The model.
        plan: Its plan, with nothing chosen yet.
        batches: Mappings of model inputs, for criteria that learn from them.
        journal: Keeps what was found, for a run that goes on.
        cache_bytes: Most bytes of block outputs that are kept in memory; the others go to the folder of the journal.
        progress: Show a progress bar.

    Returns:
        The curves by group, and the sensitivity that a repair uses too, if there is one; close it after use.

    Raises:
        CalibrationError: If the batches are unusable, or no token comes to a block.
        PlanError: If the model cannot run block by block, or a weight is not finite.
    """
    config, groups = plan.config, plan.sites
    if not groups:
        return {}, None
    by_sensitivity = config.criterion == "reconstruction" or (
        config.criterion == "fisher" and config.repair is not None
    )
    if not by_sensitivity and config.criterion not in ("fisher", "taylor"):
        scores = score_units(meta_model, plan, batches, journal, cache_bytes, progress)
        return {group.name: curve_of_scores(meta_model.model, group, scores[group.name]) for group in groups}, None
    found = next((record["curves"] for record in journal.records if "curves" in record), None)
    if found is not None and config.repair is None:
        return parsed(found), None
    with _Stream(meta_model, plan, batches, journal, cache_bytes, progress) as stream:
        if found is not None:
            return parsed(found), stream.sensitivity() if by_sensitivity else None
        curves, sensitivity = stream.curves(by_sensitivity)
    journal.add({"curves": {name: [c.order.tolist(), c.losses.tolist()] for name, c in curves.items()}})
    return curves, sensitivity


def parsed(record: Mapping[str, Any]) -> dict[str, Curve]:
    """Curves as the journal keeps them: by group, the order and the losses."""
    return {
        name: Curve(torch.tensor(order), torch.tensor(losses, dtype=torch.float64))
        for name, (order, losses) in record.items()
    }


class _Stream:
    """A model whose weights are read block by block inside the context; arguments as of :func:`unit_curves`."""

    def __init__(
        self,
        meta_model: MetaModel,
        plan: UnitPlan,
        batches: Batches,
        journal: Journal,
        cache_bytes: int,
        progress: bool | None,
    ) -> None:
        self._model, self._config, self._groups = meta_model.model, plan.config, plan.sites
        self._batches = [without_labels(self._model, b) if isinstance(b, Mapping) else b for b in batches]
        self._cache_bytes, self._folder, self._progress = cache_bytes, journal.scratch, progress
        self._lazy = LazyWeights(meta_model, finite_weights(meta_model, plan.sites), meta_model.read_rows)
        self._reading = Reading(
            self._open,
            lambda reader: measure_by_blocks(reader, plan.config.seed, progress, cache_bytes, journal.scratch),
            self._holding,
        )
        self._context = ExitStack()
        meta_model.load_buffers()

    def __enter__(self) -> _Stream:
        self._context.enter_context(explaining_meta_errors(self._model))
        self._context.enter_context(self._lazy)
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._context.__exit__(*error)

    def sensitivity(self) -> Sensitivity:
        """How much the predictions depend on the weights of all groups."""
        with self._open(measured_targets(self._model, self._config, self._groups)) as reader:
            reader.order()
            return self._reading.measure(reader)

    def curves(self, by_sensitivity: bool) -> tuple[dict[str, Curve], Sensitivity | None]:
        """The curves of all groups, and the sensitivity if it was measured on the way."""
        model, config, groups = self._model, self._config, self._groups
        if config.criterion == "reconstruction":
            return reconstruction_curves(model, config, groups, self._reading)
        curves: dict[str, Curve] = {}
        diagonals: dict[str, Tensor] = {}
        missed: dict[str, tuple[int, ...]] = {}
        for group, gates in self._gates(pairs=config.criterion == "fisher" and not by_sensitivity):
            missed[group.name] = gates.missed
            if by_sensitivity:
                diagonals[group.name] = gates.fisher
                continue
            with self._holding([piece.name for piece in group.slices] if gates.missed else []):
                curves[group.name] = gate_curve(model, group, gates, config.criterion)
        in_order = {group.name: missed[group.name] for group in groups}
        warn_of_missed_experts(in_order, sum(max(1, group.choices) for group in groups))
        if not by_sensitivity:
            return curves, None
        return redundancy_curves(model, config, groups, self._reading, diagonals)

    def _gates(self, pairs: bool) -> Iterator[tuple[UnitGroup, GateStatistics]]:
        """The statistics of each group, from the last block to the first."""
        model = self._model
        consumers = {piece.name for group in self._groups for piece in group.consumers}
        every = every_target(model)
        gates = Gates(model, self._groups, pairs)
        with no_parameter_gradients(model), self._open([t for t in every if t.name in consumers]) as reader:
            reader.order(warn=False)
            find_head = HeadFinder(model, reader.forward)
            waiting = {group.name: {piece.name for piece in group.consumers} for group in self._groups}
            for stage in Descent(reader, self._cache_bytes, self._folder).stages(self._progress, "Units"):
                names = {target.name for target in stage.targets}
                groups = [group for group in self._groups if not waiting[group.name].isdisjoint(names)]
                for group in groups:
                    waiting[group.name] -= names
                unfinished = {group.name for group in groups if waiting[group.name]}  # such as one for all layers
                examples = 0
                with ExitStack() as hooks:
                    gates.install(groups, hooks)
                    for index, calls in stage.batches():
                        generator = torch.Generator().manual_seed(derived_seed(self._config.seed, index))
                        for call in calls:
                            head = find_head(call.window)
                            with gates.reading(call.window, (index, call.part), unfinished):
                                call.run(partial(run_backwards, reader, call.window, head, generator))
                            examples += count_examples(call.window)
                finished = [group for group in groups if group.name not in unfinished]
                found = gates.statistics(finished, examples)
                yield from ((group, found[group.name]) for group in finished)
        if left := [name for name, consumers in waiting.items() if consumers]:
            raise PlanError(
                f"what reads the units of {left[0]} cannot be found block by block: spare it with exclude_modules, or "
                f"prune without streaming"
            )
        if not gates.reached:
            raise CalibrationError(NO_UNITS)

    def _open(self, targets: Sequence[Any]) -> InputReader:
        return InputReader(self._model, targets, self._batches, cache_bytes=self._cache_bytes, folder=self._folder)

    @contextmanager
    def _holding(self, names: Iterable[str]) -> Iterator[None]:
        self._lazy.hold(names)
        try:
            yield
        finally:
            self._lazy.release()
