"""What flows into each target while calibration batches run through the model; padding is left out.

The model is always run as its author wrote it, with hooks on the targets, and stopped once the targets of interest
have been called. That is right for every architecture; see :mod:`hf_prune.replay` for what makes it fast enough.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from hf_prune.distributed import all_or_none, processes, share
from hf_prune.errors import CalibrationError
from hf_prune.padding import Padding
from hf_prune.plan import PlannedTensor, PruningPlan
from hf_prune.progress import Bar
from hf_prune.replay import Replay, Stack, outer_lists
from hf_prune.running import device_of, eval_mode, no_cache, no_logits, on_device, run_model
from hf_prune.spill import Shelf
from hf_prune.sums import InputSum
from hf_prune.targets import is_finite

Batches = Iterable[Mapping[str, Any]]
NO_BATCHES = "calibration has no batches: expected at least one; a used-up generator yields none"

Statistics = dict[str, dict[str, Tensor]]
_NUMBER = re.compile(r"\d+")

CACHE_BYTES = 256 * 2**20  # of what finished blocks put out, in memory; what is beyond it goes to a temporary folder


class InputReader:
    """Runs calibration batches and gathers statistics of what flows into targets; a context manager.

    Args:
        model: The model: in eval mode inside the context, and otherwise not changed.
        plan: Its targets.
        batches: Mappings of model inputs, the same in every process; each runs its share. Tokens where
            ``attention_mask`` is 0 do not count; of a decoder that has an encoder, those where
            ``decoder_attention_mask`` is 0.
        reuse: Whether finished blocks may return what they put out before.
        cache_bytes: How much of that is kept in memory; the rest goes to a temporary folder.
        folder: Where that folder is made; None for the system's.

    Raises:
        CalibrationError: If there are no batches, or one is no mapping.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PruningPlan,
        batches: Batches,
        reuse: bool = True,
        cache_bytes: int = CACHE_BYTES,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.model = model
        self._shelf = partial(Shelf, cache_bytes, folder)
        self.batches = list(batches)
        if not self.batches:
            raise CalibrationError(NO_BATCHES)
        for batch in self.batches:
            on_device(model, batch)
        wanted = {t.target.name for t in plan.tensors}
        names = {id(parameter): name for name, parameter in model.named_parameters() if name in wanted}
        self.holders: dict[str, list[nn.Module]] = {name: [] for name in wanted}
        for module in model.modules():
            name = names.get(id(module._parameters.get("weight")))
            if name is not None:
                self.holders[name].append(module)
        self.tensors = plan.tensors
        self.reuse = reuse
        self.replay = Replay()
        self.padding = Padding(model)
        self.signatures: dict[str, tuple[int, ...]] = {}
        self.once: set[int] = set()
        self.current = 0  # the number of the batch that is running
        self._options = no_cache(model)
        self._without_logits = {**self._options, **no_logits(model, wanted)}
        self.tokens: dict[str, int] = {}
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
            self._warn_of_few_tokens()

    def _warn_of_few_tokens(self) -> None:
        """Name experts that saw fewer tokens than they have inputs.

        An expert is known by targets of the same shape, and the same name but for its numbers, that saw another number
        of tokens. All others see every token, or heads one per text: how many is the caller's choice.
        """
        kinds = {t.target.name: (_NUMBER.sub("#", t.target.name), t.target.matrix_shape) for t in self.tensors}
        counts: dict[tuple[str, tuple[int, int]], set[int]] = {}
        for name, tokens in self.tokens.items():
            counts.setdefault(kinds[name], set()).add(tokens)
        few = [
            f"{name}: {tokens} for {kinds[name][1][1]} inputs"
            for name, tokens in self.tokens.items()
            if 0 < tokens < kinds[name][1][1] and len(counts[kinds[name]]) > 1
        ]
        if few:
            warn(
                f"{len(few)} of {len(self.tensors)} targets are experts that saw fewer calibration tokens than they "
                f"have inputs ({'; '.join(few[:3])}{'; …' if len(few) > 3 else ''}): their statistics are uncertain, "
                f"and only damping makes up for it; calibrate on more texts, or name them in exclude_modules",
                stacklevel=3,
            )

    # --- the order ----------------------------------------------------------------------------------

    def order(self, warned: bool = True) -> list[list[PlannedTensor]]:
        """The targets in the order of their calls; neighbours that get the same input tensor come together.

        Targets that no batch reaches come last, with a warning: their inputs are taken to be alike.

        Args:
            warned: Whether to warn of them.
        """
        by_module = {id(module): t for t in self.tensors for module in self.holders[t.target.name]}
        steps: list[list[PlannedTensor]] = []
        seen: set[str] = set()
        last: list[Tensor] = []  # the last input: kept alive, so that no other tensor can take its place
        tokens = [0]
        signatures: dict[str, list[int]] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, tensor = first_input(args, kwargs), by_module[id(module)]
            same = bool(last) and last[0] is x
            tokens[0] += not same
            last[:] = [x]
            name = tensor.target.name
            signatures.setdefault(name, []).append(tokens[0])
            if name not in seen:
                seen.add(name)
                if same and steps:
                    steps[-1].append(tensor)
                else:
                    steps.append([tensor])

        targets = [module for modules in self.holders.values() for module in modules]
        lists = outer_lists(self.model, {id(module) for module in targets})
        calls: dict[int, int] = {}

        def count(module: nn.Module, _: Any) -> None:
            calls[id(module)] = calls.get(id(module), 0) + 1

        order: list[int] = []
        for index, batch in enumerate(self.batches):
            with ExitStack() as hooks:
                for module in targets:
                    hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
                if index == 0:
                    for module in self.model.modules():
                        hooks.callback(module.register_forward_pre_hook(count).remove)
                self._forward(batch)
            if index == 0:
                self.signatures = {name: tuple(tokens) for name, tokens in signatures.items()}
                order = list(calls)
            if len(seen) == len(self.tensors):
                break
        self.once = {key for key, number in calls.items() if number == 1}
        missing = [t for t in self.tensors if t.target.name not in seen]
        if missing and warned:
            names = ", ".join(t.target.name for t in missing[:3]) + (", …" if len(missing) > 3 else "")
            warn(
                f"no calibration batch reached {len(missing)} of {len(self.tensors)} targets ({names}): they are "
                f"pruned as if all their inputs were alike",
                stacklevel=2,
            )
        steps += [[t] for t in missing]
        if self.reuse:
            for blocks_of_list in lists:
                if all(calls.get(id(block)) == 1 for block in blocks_of_list):
                    ordered = sorted(blocks_of_list, key=lambda block: order.index(id(block)))
                    targets_of = [self._targets_in(block) for block in ordered]
                    self.replay.stacks.append(Stack(ordered, targets_of, self._shelf()))
        return steps

    def _targets_in(self, block: nn.Module) -> set[str]:
        inside = {id(module) for module in block.modules()}
        return {name for name, modules in self.holders.items() if any(id(module) in inside for module in modules)}

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return device_of(self.model)

    def block_of(self, name: str) -> nn.Module | None:
        """The block that holds a target in all its uses, where what runs before it need not be computed again."""
        return self.replay.block_of(self.holders[name])

    def finish(self, tensors: Iterable[PlannedTensor]) -> None:
        """Say that these targets have their final weights, so that blocks without others need not run again."""
        self.replay.finish({t.target.name for t in tensors})

    def advance(self) -> None:
        """Have the finished blocks put out what later runs replay, without computing anything after them.

        :meth:`gather` does so on the way; done apart, the weights of one block suffice at a time.
        """
        if self.replay.behind():
            self._run([], frozenset(), range(len(self.batches)))

    # --- statistics ---------------------------------------------------------------------------------

    def gather(self, tensors: Sequence[PlannedTensor], needs: frozenset[str], progress: bool = False) -> Statistics:
        """Statistics of the inputs of some targets, on the weights as they are.

        Args:
            tensors: The targets.
            needs: ``"input_gram"``, ``"input_norm"`` or both.
            progress: Show a progress bar.

        Raises:
            CalibrationError: If an input is not finite.
        """
        if self.replay.unchecked:
            firsts = range(min(processes()[1], len(self.batches)))  # the first of each process
            self.replay.check(lambda: self._run(tensors, needs, firsts, record=False))
        sums = self._run(tensors, needs, range(len(self.batches)), progress=progress)
        found = {}
        for t in tensors:
            name = t.target.name
            found[name] = sums[name].statistics(needs, device_of(self.holders[name][0]))
            self.tokens[name] = sums[name].tokens
            check_finite(name, found[name])
        return found

    def _run(
        self,
        tensors: Sequence[PlannedTensor],
        needs: frozenset[str],
        batches: Sequence[int],
        progress: bool = False,
        record: bool = True,
    ) -> dict[str, InputSum]:
        sums: dict[str, InputSum] = {}
        by_signature: dict[tuple[int, ...], str] = {}
        watchers: list[Watcher] = []
        for t in tensors:
            name = t.target.name
            signature = self.signatures.get(name)
            if signature is not None and signature in by_signature:  # the same inputs: gathered once
                sums[name] = sums[by_signature[signature]]
                continue
            if signature is not None:
                by_signature[signature] = name
            sums[name] = InputSum(needs, t.target.matrix_shape[1])
            watchers += [Watcher(module, self._reader(sums[name], t.target.layout)) for module in self.holders[name]]
        self.run(watchers, batches, progress, record)
        device = device_of(self.model)
        for total in {id(total): total for total in sums.values()}.values():
            total.add_others(device)
        return sums

    def run(
        self,
        watchers: Sequence[Watcher],
        batches: Sequence[int],
        progress: bool = False,
        record: bool = True,
        after_batch: Callable[[], None] | None = None,
    ) -> None:
        """Run batches with hooks on some modules, and stop each as soon as those that it waits for were called.

        Args:
            watchers: What to call when; without any, blocks put out what later runs replay.
            batches: Numbers of the batches; each process runs its share.
            progress: Show a progress bar.
            record: Have blocks that are finished put out what later runs replay.
            after_batch: Called after each batch.
        """
        stop_after: set[object] | None = None
        # A run may stop early only if no further call is to come, as far as the first batch shows.
        if all(id(watcher.module) in self.once for watcher in watchers):
            stop_after = {watcher for watcher in watchers if watcher.waits}
        advancing = self.replay.behind() if record else []
        with ExitStack() as hooks:
            left: set[object] = set()
            for watcher in watchers:
                watcher.install(hooks, left if stop_after is not None else None)
            self.replay.install(hooks, lambda: self.current)
            for stack in advancing:
                recorder = Watcher(*self.replay.start_recording(stack, lambda: self.current), after=True)
                recorder.install(hooks, left if stop_after is not None else None)
                if stop_after is not None:
                    stop_after.add(recorder)
            with all_or_none():
                for index in Bar(share(batches), desc="Calibrating", progress=progress):
                    self.current = index
                    left |= stop_after or set()
                    try:
                        self._forward(self.batches[index])
                    except _Stop:
                        pass
                    if after_batch is not None:
                        after_batch()
        for stack in advancing:
            self.replay.stop_recording(stack, len(self.batches))

    def _reader(self, total: InputSum, layout: str) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            total.add(self.padding.rows(module, first_input(args, kwargs), layout))

        return read

    @torch.no_grad()
    def _forward(self, batch: Mapping[str, Any]) -> None:
        """Run a batch for its hooks alone; where it has labels, the loss needs every logit."""
        self._call(batch, self._options if "labels" in batch else self._without_logits)

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """What the model puts out for a batch, whose padding :attr:`padding` then knows."""
        return self._call(batch, self._options)

    def _call(self, batch: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        inputs = on_device(self.model, batch)
        with self.padding.of(inputs):
            return run_model(self.model, {**options, **inputs})


@dataclass(frozen=True, eq=False)
class Watcher:
    """A module of interest in a run.

    Args:
        module: The module.
        call: Gets the module, its arguments, its keyword arguments and its output; what it returns, if anything, takes
            the output's place.
        after: Call it after the module's forward; before it there is no output yet, and None in its place.
        waits: Whether the run goes on until the module was called.
    """

    module: nn.Module
    call: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
    after: bool = False
    waits: bool = True

    def install(self, hooks: ExitStack, left: set[object] | None) -> None:
        """Hook it up.

        Args:
            hooks: Removes the hook at its end.
            left: What the run still waits for; None if it does not stop early.
        """

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
            found = self.call(module, args, kwargs, output)
            if left is not None and self.waits:
                left.discard(self)
                if not left:
                    raise _Stop
            return found

        if self.after:
            hooks.callback(self.module.register_forward_hook(hook, with_kwargs=True).remove)
        else:
            hooks.callback(self.module.register_forward_pre_hook(hook, with_kwargs=True).remove)


class _Stop(Exception):
    """Everything of interest was seen; never leaves this module."""


def check_finite(name: str, statistics: Mapping[str, Tensor]) -> None:
    """Make sure that what was gathered for a target is finite.

    Raises:
        CalibrationError: If it is not.
    """
    if not all(is_finite(value) for value in statistics.values()):
        raise CalibrationError(
            f"the inputs of {name} are not finite: expected finite values; calibrate in float32 or bfloat16, "
            f"and check the batches"
        )


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a module multiplies: its first argument."""
    return args[0] if args else next(iter(kwargs.values()))
