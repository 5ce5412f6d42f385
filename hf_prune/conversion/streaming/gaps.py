"""Make up for removed layers with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.batches import without_labels
from hf_prune.calibration.descent import run_block, sequence_of
from hf_prune.calibration.hooks import Watcher
from hf_prune.calibration.input_reader import InputReader
from hf_prune.calibration.padding import first_tensor
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.conversion.streaming.layer_losses import one_target_each, switched_off
from hf_prune.conversion.streaming.lazy_weights import LazyWeights
from hf_prune.conversion.streaming.meta_model import MetaModel, explaining_meta_errors
from hf_prune.conversion.streaming.repaired_values import RepairedValues
from hf_prune.conversion.streaming.runner import Batches
from hf_prune.structured.close_gaps import Gap, GapSums, adds_only, find_gaps, token_rows
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.utils.forward import batch_to_device
from hf_prune.utils.offload_cache import OffloadCache
from hf_prune.utils.progress import Bar


@torch.no_grad()
def close_gaps_by_blocks(
    meta_model: MetaModel,
    plan: UnitPlan,
    batches: Batches,
    values: RepairedValues,
    journal: Journal,
    cache_bytes: int,
    progress: bool | None = None,
) -> None:
    """What :func:`~hf_prune.structured.close_gaps.close_gaps` solves for, with one block in memory at a time.

    Args:
        meta_model: The dense model.
        plan: What stays of it.
        batches: Mappings of model inputs.
        values: Gets the new weights before gaps; those that it has are not solved for again.
        journal: Its scratch folder gets what blocks return.
        cache_bytes: Most bytes of that which are kept in memory.
        progress: Show a progress bar.

    Raises:
        CalibrationError: If the batches are unusable.
        PlanError: If the model cannot run block by block.
    """
    model = meta_model.model
    assert plan.choice is not None
    removed = {name: model.get_submodule(name) for name in plan.choice.layers}
    gaps = find_gaps(model, removed)
    if not gaps:
        return
    meta_model.load_buffers()
    inputs = [without_labels(model, batch_to_device(model, batch)) for batch in batches]
    with ExitStack() as context:
        context.enter_context(explaining_meta_errors(model))
        is_dense = True

        def read(name: str) -> Tensor:
            return values[name] if name in values and not is_dense else meta_model.read(name)

        lazy = LazyWeights(meta_model, read, meta_model.read_rows, skip_head=True)
        context.enter_context(lazy)
        targets = one_target_each(model, {name: model.get_submodule(name) for name in plan.layers})
        reader = context.enter_context(InputReader(model, targets, inputs))
        reader.order(warn=False)
        runs = _Runs(reader, lazy, cache_bytes, journal)
        context.callback(runs.close)
        last = runs.place(gaps[-1].last)
        by_place = {runs.place(gap.before): (place, gap) for place, gap in enumerate(gaps)}
        highest = max(by_place)  # nothing above it is solved for
        total = last + highest + 2
        bar = context.enter_context(Bar[object](total=total, desc="Gaps", unit="block", progress=progress))
        for number in range(last + 1):
            runs.record(number, gaps)
            bar.update()
        is_dense = False
        runs.gone = {runs.place(layer) for layer in removed.values()}
        for number in range(highest + 1):
            place, gap = by_place.get(number, (0, None))
            if gap is not None and gap.weight not in values:
                if (solved := runs.solution(number, place, gap)) is not None:
                    values.write({gap.weight: solved})
            if number < highest:
                runs.record(number)
            bar.update()


class _Runs:
    """Runs all batches through one block after another.

    Attributes:
        gone: Numbers of the blocks that return what they get.
    """

    def __init__(self, reader: InputReader, lazy: LazyWeights, cache_bytes: int, journal: Journal) -> None:
        self._reader, self._lazy, self._sequence = reader, lazy, sequence_of(reader)
        self.gone: set[int] = set()
        self._outputs, self._wanted = (OffloadCache(cache_bytes, journal.scratch) for _ in range(2))

    def close(self) -> None:
        """Forget what blocks returned."""
        self._outputs.close()
        self._wanted.close()

    def place(self, block: nn.Module) -> int:
        """The number of a block."""
        return next(number for number, other in enumerate(self._sequence.blocks) if other is block)

    def record(self, number: int, gaps: Sequence[Gap] = ()) -> None:
        """Run a block on what the one before it returned.

        Args:
            number: The block.
            gaps: Those behind which what the block returns is wanted.
        """
        self._lazy.hold(self._lazy.names_in(self._sequence.blocks[number]))
        places = [place for place, gap in enumerate(gaps) if gap.last is self._sequence.blocks[number]]
        for index, window in enumerate(self._reader.batches):
            returned = self._run(number, index)
            for place in places:
                self._wanted.put((place, index), token_rows(self._reader.model, window, first_tensor(returned)))
            self._outputs.put((index, number % 2), returned)
        self._lazy.release()

    def solution(self, number: int, place: int, gap: Gap) -> Tensor | None:
        """The weight before a gap, solved for again; None if that cannot be.

        Args:
            number: The block before the gap.
            place: The number of the gap.
            gap: The gap.
        """
        model, linear = self._reader.model, self._reader.model.get_submodule(gap.weight.rpartition(".")[0])
        self._lazy.hold(self._lazy.names_in(self._sequence.blocks[number]))
        sums, read = GapSums(linear), []

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            read.append(args[0])

        for index, window in enumerate(self._reader.batches):
            with ExitStack() as hooks:
                Watcher(linear, keep, after=True).install(hooks, None)
                returned = first_tensor(self._run(number, index))
            if index == 0:
                sums.adds = adds_only(returned, linear, lambda: first_tensor(self._run(number, 0)))
            rows = token_rows(model, window, read.pop())
            sums.add(rows, self._wanted.get((place, index)), token_rows(model, window, returned))
        solved = sums.solution(self._lazy[gap.weight])
        self._lazy.release()
        return solved

    def _run(self, number: int, index: int) -> Any:
        output = partial(self._outputs.get, (index, (number - 1) % 2))
        with switched_off(self._sequence.blocks[number]) if number in self.gone else nullcontext():
            return run_block(self._reader, self._sequence, number, self._reader.batches[index], output)
