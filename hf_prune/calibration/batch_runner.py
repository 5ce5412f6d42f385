"""Runs batches through a model with hooks on some modules, and computes no more than the hooks look at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_prune.calibration.batches import NO_BATCHES, Batches, batch_kinds, sample_batches
from hf_prune.calibration.hooks import Stop, Watcher
from hf_prune.calibration.padding import Padding, first_input, first_tensor
from hf_prune.calibration.replay import Replay
from hf_prune.calibration.routed_rows import RoutedRows
from hf_prune.calibration.slabs import SlabCalls, attentions_of, packed_targets
from hf_prune.calibration.tainted import Tainted
from hf_prune.calibration.trial import NotAlikeError
from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import Target
from hf_prune.utils.distributed import all_reduce_sum, fail_together, rank_items
from hf_prune.utils.forward import batch_to_device, device_of, no_cache, no_logits, run_model
from hf_prune.utils.progress import Bar


class BatchRunner:
    """A model and its calibration batches, run with hooks.

    Args:
        model: The model, in eval mode whenever it is run.
        batches: Mappings of model inputs, the same in every process; each process runs its share.
        targets: The weights whose inputs or outputs the hooks look at.
        replay: Its finished blocks return what they returned before.

    Attributes:
        device: Where the model computes.
        padding: Knows the padding of the batch that is running.
        packed: The targets of several matrices that modules multiply with without being called, by name.
        routed: Whether a router chooses the tokens of some targets, so that it is followed which ones.
        kinds: For each batch the number of the first batch of its kind.
        samples: Numbers of the batches on which it is tried how the model behaves.
        once: Ids of the modules that each sample calls once at most.
        current: The number of the batch that is running.

    Raises:
        CalibrationError: If there are no batches, or one is not a mapping.
    """

    def __init__(self, model: nn.Module, batches: Batches, targets: Collection[Target], replay: Replay) -> None:
        self.model = model
        self.device = device_of(model)  # kept: where no weight is loaded, the search passes over all of them
        self.batches = list(batches)
        if not self.batches:
            raise CalibrationError(NO_BATCHES)
        for batch in self.batches:
            batch_to_device(model, batch, self.device)  # refuses what is not a batch
        self.replay = replay
        self.packed = packed_targets(model, targets)
        rows = RoutedRows()
        attentions = attentions_of(model, targets)
        self._slab_calls = SlabCalls(self.packed.values(), rows, attentions)
        self.routed = bool(self.packed or attentions)
        self.padding = Padding(model, rows)
        self.kinds = batch_kinds(self.batches)
        self.samples = sample_batches(self.batches, self.kinds)
        self.once: set[int] = set()
        self.current = 0
        self._diverged = False  # what the samples have shown does not hold for the batch that is running
        self._options = no_cache(model)
        self._without_logits = {**self._options, **no_logits(model, {t.name for t in targets})}

    def run(
        self,
        watchers: Sequence[Watcher],
        batches: Sequence[int],
        progress: bool | None = None,
        record: bool = True,
        after_batch: Callable[[], bool] | None = None,
    ) -> None:
        """Run batches with hooks, and stop each one as soon as all modules that it waits for were called.

        Args:
            watchers: What to call when; without any, finished blocks record what later runs replay.
            batches: Numbers of the batches; each process runs its share.
            progress: Show a progress bar.
            record: Have finished blocks record what they return, for later runs.
            after_batch: Called after each batch; returns False if the batch went another way than the samples.

        Raises:
            NotAlikeError: If a batch did so, in any process; from then on every block is computed.
        """
        recording = self.replay.ready_to_record() if record else []
        if self.replay.active:
            watchers = [replace(watcher, call=self._guarded(watcher.call)) for watcher in watchers]
        # A run may stop early only if no further call is to come, as far as the samples show.
        stops_early = all(id(watcher.module) in self.once for watcher in watchers)
        awaited: set[object] = {watcher for watcher in watchers if watcher.waits}
        remaining: set[object] | None = set() if stops_early else None
        self._diverged = False
        with ExitStack() as hooks:
            for watcher in watchers:
                watcher.install(hooks, remaining)
            self.replay.install(hooks, lambda: self.current)
            for sequence in recording:
                recorder = Watcher(*self.replay.start_recording(sequence, lambda: self.current), after=True)
                recorder.install(hooks, remaining)
                awaited.add(recorder)
            with fail_together():
                for index in Bar(rank_items(batches), desc="Calibrating", progress=progress):
                    if remaining is not None:
                        remaining.clear()
                        remaining |= awaited
                    self._run_guarded(index)
                    if after_batch is not None and not self._diverged:
                        self._diverged = not after_batch()
                    if self._diverged:
                        break
        if int(all_reduce_sum(torch.tensor(int(self._diverged)))):  # in any process
            self.replay.give_up()
            raise NotAlikeError
        for sequence in recording:
            self.replay.stop_recording(sequence, sum(kind in sequence.kinds for kind in self.kinds))

    def _run_guarded(self, index: int) -> None:
        """Run a batch, and note whether it diverges from what replayed blocks expect."""
        self.replay.start_batch()
        stopped = False
        try:
            self.run_batch(index)
        except Stop:
            stopped = True
        except Exception:
            if not self.replay.active:
                raise
            self._diverged = True  # it may have failed because blocks were replayed: try again with all computed
        self._diverged |= not self.replay.is_complete(self.kinds[index], stopped)

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call of a watcher, unless what it gets depends on values that replayed blocks did not compute."""

        def guarded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            for x in (first_input(args, kwargs), None if output is None else first_tensor(output)):
                if isinstance(x, Tainted):
                    self._diverged = True
                    raise Stop
            return call(module, args, kwargs, output)

        return guarded

    @torch.no_grad()
    def run_batch(self, index: int) -> None:
        """Run one batch for its hooks alone; where it has labels, the loss needs every logit."""
        self.current = index
        batch = self.batches[index]
        self._forward(batch, self._options if "labels" in batch else self._without_logits)

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """The model's outputs for a batch, whose padding :attr:`padding` then knows."""
        return self._forward(batch, self._options)

    def _forward(self, batch: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        inputs = batch_to_device(self.model, batch, self.device)
        with self.padding.of(inputs), self._slab_calls.watching() if self.routed else nullcontext():
            return run_model(self.model, {**options, **inputs})
