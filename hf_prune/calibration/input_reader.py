"""What flows into each target while calibration batches run through the model; padding is left out.

The model is always run as its author wrote it, with hooks on the targets, and stopped once the targets of interest
have been called. That is right for every architecture; :mod:`~hf_prune.calibration.replay` makes it fast enough.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_prune.calibration.accumulators import SlabAccumulators
from hf_prune.calibration.batch_runner import BatchRunner
from hf_prune.calibration.batches import Batches
from hf_prune.calibration.block_sequence import BlockSequence, find_sequence, outer_lists
from hf_prune.calibration.call_order import find_users, observe_calls, split_shared
from hf_prune.calibration.hooks import Watcher
from hf_prune.calibration.input_groups import group_by_input
from hf_prune.calibration.reach import report_unreached, warn_of_few_tokens
from hf_prune.calibration.replay import Replay, Trials
from hf_prune.calibration.trial import NotAlikeError, Tracer
from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import Target, is_finite
from hf_prune.utils.forward import device_of, eval_mode
from hf_prune.utils.offload_cache import OffloadCache

Statistics = dict[str, dict[str, Tensor]]
Result = TypeVar("Result")
CACHE_BYTES = 256 * 2**20  # outputs of finished blocks kept in memory; the rest goes to a temporary folder


class InputReader(BatchRunner):
    """Runs calibration batches and gathers statistics of what flows into targets; a context manager.

    Args:
        model: The model: in eval mode inside the context, and otherwise not changed.
        targets: The weights whose inputs are looked at.
        batches: Mappings of model inputs, the same in every process; each process runs its share. Tokens where
            ``attention_mask`` is 0 do not count; of a decoder that has an encoder, those where
            ``decoder_attention_mask`` is 0.
        reuse: Whether finished blocks may return what they returned before.
        cache_bytes: How much of that is kept in memory; the rest goes to a temporary folder.
        folder: Where that folder is made; None for the system's.
        trials: What another reader of the same model, targets and batches has found out; None for nothing.

    Attributes:
        holders: By target, the modules that multiply with it; of packed parameters, one that stands for each matrix.
        places: The same, with the module of the model that holds a packed parameter.
        users: By target, all modules that have it: a tied embedding looks its rows up.
        inputs: By target, the numbers of its inputs; targets with the same numbers get the same tensors.
        tokens: By target, how many tokens each of its matrices saw.

    Raises:
        CalibrationError: If there are no batches, or one is not a mapping.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Iterable[Target],
        batches: Batches,
        reuse: bool = True,
        cache_bytes: int = CACHE_BYTES,
        folder: str | os.PathLike[str] | None = None,
        trials: Trials | None = None,
    ) -> None:
        self.targets = tuple(targets)
        batches = list(batches)
        super().__init__(model, batches, self.targets, Replay(self._tracer, batches, reuse, trials))
        holders, self.users = find_users(model, self.targets)
        self.places = {**holders, **{name: [entry.owner] for name, entry in self.packed.items()}}
        self.holders = {**holders, **{name: list(entry.slabs) for name, entry in self.packed.items()}}
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.tokens: dict[str, tuple[int, ...]] = {}
        self._new_cache = partial(OffloadCache, cache_bytes, folder)
        self._context = ExitStack()

    def __enter__(self) -> InputReader:
        self._context.enter_context(eval_mode(self.model))
        self._context.callback(self.replay.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._context.close()
        if kind is None:
            warn_of_few_tokens(self.targets, self.tokens)

    def order(self, warn: bool = True) -> list[list[Target]]:
        """The targets in the order of their calls; neighbours that get the same input tensor come together.

        Targets that no batch reaches come last, with a warning: their inputs are taken to be alike.

        Args:
            warn: Whether to warn of them.
        """
        observed = observe_calls(self, self.targets, self.holders)
        self.inputs, self.once = observed.inputs, observed.once
        for entry in self.packed.values():  # an expert that no sample reaches is called once at most all the same
            if id(entry.owner) in self.once:
                self.once |= {id(slab) for slab in entry.slabs if not observed.repeats(slab)}
        steps = split_shared(observed.steps, self.users, self.once)
        reached = {t.name for step in steps for t in step}
        if unreached := [t for t in self.targets if t.name not in reached]:
            report_unreached(self.model, self.targets, unreached, observed.called, warn)
        names: dict[int, set[str]] = {}
        for name, modules in self.places.items():
            for module in modules:
                names.setdefault(id(module), set()).add(name)
        for blocks in outer_lists(self.model, set(names)):
            sequence = find_sequence(blocks, observed.counts, self.kinds, names, self._new_cache)
            if sequence is not None:
                self.replay.add(sequence)
        return steps + [[t] for t in unreached]

    # --- replay -------------------------------------------------------------------------------------

    def block_of(self, name: str) -> nn.Module | None:
        """The block that holds a target in all its uses, where what runs before it need not be computed again."""
        return self.replay.block_of(self.places[name])

    def watchers(self, name: str, call: Callable[..., Any], after: bool = False) -> list[Watcher]:
        """Hooks on all calls of a target.

        A run need not wait for every expert of a packed parameter, some of which no token may reach.

        Args:
            name: The target.
            call: See :class:`Watcher`.
            after: See :class:`Watcher`.
        """
        if name not in self.packed:
            return [Watcher(module, call, after) for module in self.holders[name]]
        experts = [Watcher(module, call, after, waits=False) for module in self.holders[name]]
        return [*experts, Watcher(self.packed[name].owner, lambda *_: None, after=True)]

    def finish(self, targets: Iterable[Target]) -> None:
        """Say that these targets have their final weights, so that blocks without others need not run again."""
        self.replay.finish({t.name for t in targets})

    def advance(self) -> None:
        """Record what finished blocks return, and compute nothing after them.

        :meth:`gather` records on the way; done apart, the weights of one block at a time suffice.
        """
        while self.replay.ready_to_record():
            self.repeated(lambda: self.run([], range(len(self.batches))))

    def repeated(self, attempt: Callable[[], Result]) -> Result:
        """Call a function that runs batches, again if replayed blocks turn out to make a difference.

        Args:
            attempt: Starts from nothing each time.
        """
        while True:
            try:
                return attempt()
            except NotAlikeError:  # from now on every block is computed, and every target is gathered by itself
                self.inputs.clear()

    def verify(self) -> bool:
        """Whether the blocks of all sequences may be replayed, however far pruning has come."""
        return all([all(self.replay.check(sequence)) for sequence in self.replay.sequences])

    def _tracer(self, sequences: Sequence[BlockSequence]) -> Tracer:
        layouts = {id(module): t.layout for t in self.targets for module in self.holders[t.name]}

        def read(module: nn.Module, x: Any) -> Tensor | None:
            if not isinstance(x, Tensor) or x.dim() == 0:
                return None
            return x.movedim(1, -1) if layouts.get(id(module)) == "conv" else self.padding.rows(module, x)

        blocks = [block for sequence in sequences for block in sequence.blocks]
        return Tracer(self.run_batch, self.holders, self.users, blocks, read)

    # --- statistics ---------------------------------------------------------------------------------

    def gather(self, targets: Sequence[Target], needs: frozenset[str], progress: bool | None = None) -> Statistics:
        """Statistics of the inputs of some targets, with the weights that the model has now.

        Args:
            targets: The targets.
            needs: ``"input_gram"``, ``"input_norm"``, ``"input_mean"`` or several of them.
            progress: Show a progress bar.

        Returns:
            Statistics by the name of the target, then by the names in ``needs``.

        Raises:
            CalibrationError: If an input is not finite.
        """
        accumulators = self.repeated(lambda: self._accumulate(targets, needs, progress))
        statistics = {}
        for t in targets:
            statistics[t.name] = accumulators[t.name].statistics(needs, self.device_of(t.name))
            self.tokens[t.name] = accumulators[t.name].tokens
            check_finite(t.name, statistics[t.name])
        return statistics

    def device_of(self, name: str) -> torch.device:
        """Where a target lies."""
        return device_of(self.places[name][0]) if self.places[name] else self.device

    def _accumulate(
        self, targets: Sequence[Target], needs: frozenset[str], progress: bool | None
    ) -> dict[str, SlabAccumulators]:
        groups, accumulators, watchers = group_by_input(
            targets, partial(SlabAccumulators, needs), self.inputs, self.watchers, self.padding
        )

        def same_inputs() -> bool:
            return all([group.end_batch() for group in groups])

        self.run(watchers, range(len(self.batches)), progress, after_batch=same_inputs)
        for group in groups:
            group.accumulator.add_others(self.device)
        return accumulators


def check_finite(name: str, statistics: Mapping[str, Tensor]) -> None:
    """Make sure that the statistics of a target are finite.

    Raises:
        CalibrationError: If they are not.
    """
    if not all(is_finite(value) for value in statistics.values()):
        raise CalibrationError(
            f"the inputs of {name} are not finite: expected finite values; calibrate in float32 or bfloat16, "
            f"and check the batches"
        )
