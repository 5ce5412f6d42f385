"""What removing each layer of a checkpoint costs, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.bypass import bypass, restore
from hf_prune.calibration.batches import count_examples, small_batches, without_labels
from hf_prune.calibration.descent import run_block, sequence_of
from hf_prune.calibration.input_reader import InputReader
from hf_prune.calibration.predictions import named_logits, token_mask
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.conversion.streaming.lazy_weights import LazyWeights
from hf_prune.conversion.streaming.meta_model import MetaModel, explaining_meta_errors
from hf_prune.conversion.streaming.runner import Batches
from hf_prune.errors import PlanError
from hf_prune.kernels.matrix import Target
from hf_prune.planning.targets import every_target
from hf_prune.structured.gate_statistics import prediction_change
from hf_prune.structured.layer_losses import greedy_losses, losses_without_data, sample_batches
from hf_prune.structured.meet_budget import most_layers
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.structured.unit_scores import sum_of_squares
from hf_prune.utils.forward import batch_to_device
from hf_prune.utils.offload_cache import OffloadCache
from hf_prune.utils.progress import Bar


@torch.no_grad()
def layer_losses_by_blocks(
    meta_model: MetaModel,
    plan: UnitPlan,
    batches: Batches,
    journal: Journal,
    cache_bytes: int,
    progress: bool | None = None,
) -> dict[str, float]:
    """How much removing each layer costs, the same as with the whole model in memory.

    Args:
        meta_model: The model.
        plan: Its plan, with the layers that may go and nothing chosen yet.
        batches: Mappings of model inputs, for criteria that learn from them.
        journal: Keeps what was found, for a run that goes on.
        cache_bytes: Most bytes of block outputs that are kept in memory; the others go to the folder of the journal.
        progress: Show a progress bar.

    Raises:
        CalibrationError: If the batches are unusable.
        PlanError: If the model cannot run block by block.
    """
    model, config = meta_model.model, plan.config
    modules = {name: model.get_submodule(name) for name in plan.layers}
    if not modules:
        return {}
    if not config.learns_units:
        names = {id(parameter): name for name, parameter in model.named_parameters()}

        def squares(parameter: nn.Parameter) -> float:
            return sum_of_squares(meta_model.read(names[id(parameter)]) if parameter.is_meta else parameter)

        return losses_without_data(config, modules, squares)
    meta_model.load_buffers()
    lazy = LazyWeights(meta_model, meta_model.read, meta_model.read_rows)
    with explaining_meta_errors(model), lazy:
        greedy = config.criterion == "greedy"
        if greedy:
            windows = list(sample_batches(model, batches))
        else:
            windows = [
                window
                for batch in batches
                for window in small_batches(model, without_labels(model, batch_to_device(model, batch)))
            ]
        examples = max(1, sum(map(count_examples, windows)))
        with InputReader(model, one_target_each(model, modules), windows) as reader, ExitStack() as context:
            reader.order(warn=False)
            outputs, dense = (OffloadCache(cache_bytes, journal.scratch) for _ in range(2))
            context.callback(outputs.close)
            context.callback(dense.close)
            runs = _Variants(reader, lazy, modules, outputs, dense, greedy, progress)

            def changes(tried: Sequence[str], removed: Sequence[str]) -> dict[str, float]:
                for record in journal.records:
                    if record.get("without") == list(removed):
                        return record["changes"]
                found = runs.changes(tried, removed)
                journal.add({"without": list(removed), "changes": found})
                return found

            if greedy:
                return greedy_losses(list(modules), (), most_layers(plan), examples, changes)
            return {name: change / examples for name, change in changes(list(modules), ()).items()}


def one_target_each(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[Target]:
    """A weight in each layer, by whose calls the reader finds the blocks."""
    every = every_target(model)
    own = {id(parameter): name for name, layer in layers.items() for parameter in layer.parameters()}
    by_layer: dict[str, Target] = {}
    for target in every:
        layer = own.get(id(model.get_parameter(target.name)))
        if layer is not None and target.slabs == 1:
            by_layer.setdefault(layer, target)
    return list(by_layer.values())


class _Variants:
    """Runs a model without one layer more, for each of several, through one block after another.

    Args:
        reader: Runs windows of text through the model.
        lazy: Its weights.
        layers: Layers that may go, by name.
        outputs: Keeps what blocks return.
        dense: Keeps the predictions of the whole model.
        keeps_dense: Whether the predictions of the whole model are asked for again.
        progress: Show progress bars.

    Raises:
        PlanError: If the model does not run as one sequence of blocks, or a layer is none of them.
    """

    def __init__(
        self,
        reader: InputReader,
        lazy: LazyWeights,
        layers: Mapping[str, nn.Module],
        outputs: OffloadCache,
        dense: OffloadCache,
        keeps_dense: bool,
        progress: bool | None,
    ) -> None:
        self._keeps_dense = keeps_dense
        self._reader, self._lazy, self._outputs, self._dense = reader, lazy, outputs, dense
        self._sequence, self._progress = sequence_of(reader), progress
        places = {id(block): number for number, block in enumerate(self._sequence.blocks)}
        if outside := [name for name, layer in layers.items() if id(layer) not in places]:
            raise PlanError(
                f"{outside[0]} of {type(reader.model).__name__} is no block by itself, so the model cannot be run "
                f"without it: choose criterion 'magnitude', or do not stream"
            )
        self._place = {name: places[id(layer)] for name, layer in layers.items()}
        self._inside = [lazy.names_in(block) for block in self._sequence.blocks]
        head: Any = getattr(reader.model, "get_output_embeddings", lambda: None)()
        self._head = [] if head is None else lazy.names_in(head)

    def changes(self, tried: Sequence[str], removed: Collection[str]) -> dict[str, float]:
        """How much the predictions change without some layers and one more, for each that is tried.

        Args:
            tried: Names of layers.
            removed: Those that are gone in any case.

        Returns:
            Sums over the examples.
        """
        reader = self._reader
        if removed and 0 not in self._dense:  # an interrupted run goes on
            for index, _, logits in self._predictions((), (), with_base=True):
                self._dense.put(index, logits)
        totals = dict.fromkeys(tried, 0.0)
        expected: list[Tensor] = []
        window = -1
        for index, name, logits in self._predictions(tried, removed, with_base=not removed):
            if name is None:
                window, expected = index, logits
                if self._keeps_dense:
                    self._dense.put(index, logits)
                continue
            if window != index:
                window, expected = index, self._dense.get(index)
            mask = token_mask(reader.model, reader.batches[index])
            totals[name] += sum(prediction_change(a, b, mask) for a, b in zip(expected, logits, strict=True))
        return totals

    def _predictions(
        self, tried: Sequence[str], removed: Collection[str], with_base: bool
    ) -> Iterator[tuple[int, str | None, list[Tensor]]]:
        """The logits of each window without some layers, first with no more of them gone (None), then with one more."""
        reader, blocks = self._reader, self._sequence.blocks
        gone = {self._place[name] for name in removed}
        last = max((self._place[name] for name in tried), default=0)
        with Bar[object](total=len(blocks) + 1, desc="Layers", unit="block", progress=self._progress) as bar:
            for number in range(len(blocks)):
                self._lazy.hold(self._inside[number])
                begun = [name for name in tried if self._place[name] <= number]
                for index in range(len(reader.batches)):
                    for name in begun:
                        is_gone = number in gone or self._place[name] == number
                        self._run(number, index, name if self._place[name] < number else None, name, is_gone)
                    if with_base or number < last:  # last, since the others read what it returned before
                        self._run(number, index, None, None, number in gone)
                bar.update()
            self._lazy.hold(self._head)
            for index, window in enumerate(reader.batches):
                for variant in [*([None] if with_base else []), *tried]:
                    output = partial(self._outputs.get, (index, variant))
                    with self._sequence.replaying(len(blocks), output):
                        yield index, variant, [y.float().cpu() for y in named_logits(reader.forward(window))]
            bar.update()
        self._lazy.release()

    def _run(self, number: int, index: int, before: str | None, name: str | None, is_gone: bool) -> None:
        """Run a block for one window, or pass over it.

        Args:
            number: The block.
            index: The window.
            before: Whose outputs it reads.
            name: Whose outputs it writes.
            is_gone: Whether it is bypassed.
        """
        output = partial(self._outputs.get, (index, before))
        with switched_off(self._sequence.blocks[number]) if is_gone else nullcontext():
            returned = run_block(self._reader, self._sequence, number, self._reader.batches[index], output)
        self._outputs.put((index, name), returned)


@contextmanager
def switched_off(layer: nn.Module) -> Iterator[None]:
    """Inside, a layer returns what it gets. Never while others replay it: they would get what it gets."""
    bypass(layer)
    try:
        yield
    finally:
        restore(layer)
