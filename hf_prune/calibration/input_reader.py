"""What flows into each target while calibration batches run through the model; padding is left out.

The model is always run as its author wrote it, with hooks on the targets, and stopped once the targets of interest
have been called. That is right for every architecture; see :mod:`replay` for what makes it fast enough.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_prune.calibration.accumulators import InputAccumulator
from hf_prune.calibration.block_sequence import BlockSequence, outer_lists
from hf_prune.calibration.hooks import Leader, Stop, Watcher, tensor_version
from hf_prune.calibration.padding import Padding, first_input, first_tensor
from hf_prune.calibration.replay import Replay
from hf_prune.calibration.tainted import Tainted
from hf_prune.calibration.trial import NotAlikeError, Tracer
from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import is_finite
from hf_prune.planning.plan import PlannedTensor, PruningPlan
from hf_prune.planning.targets import prunable_modules
from hf_prune.utils.distributed import all_reduce_sum, broadcast, fail_together, rank_items
from hf_prune.utils.formatting import first_few
from hf_prune.utils.forward import batch_to_device, device_of, eval_mode, no_cache, no_logits, run_model
from hf_prune.utils.notices import warn_user
from hf_prune.utils.offload_cache import OffloadCache
from hf_prune.utils.progress import Bar

Batches = Iterable[Mapping[str, Any]]
NO_BATCHES = "calibration has no batches: expected at least one; a used-up generator yields none"
Statistics = dict[str, dict[str, Tensor]]
Result = TypeVar("Result")
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
        self.device = device_of(model)  # looked for once: where no weight is loaded, it is looked for in all of them
        self._shelf = partial(OffloadCache, cache_bytes, folder)
        self.batches = list(batches)
        if not self.batches:
            raise CalibrationError(NO_BATCHES)
        for batch in self.batches:
            batch_to_device(model, batch, self.device)
        wanted = {t.target.name for t in plan.tensors}
        names = {id(parameter): name for name, parameter in model.named_parameters() if name in wanted}
        multiply = {id(module) for _, (module, _) in prunable_modules(model)}
        # Modules that multiply with a target, and all that have it: a tied embedding looks its rows up.
        self.holders: dict[str, list[nn.Module]] = {name: [] for name in wanted}
        self.users: dict[str, list[nn.Module]] = {name: [] for name in wanted}
        for module in model.modules():
            for parameter in module._parameters.values():
                if (name := names.get(id(parameter))) is not None:
                    self.users[name].append(module)
                    if id(module) in multiply and parameter is module._parameters.get("weight"):
                        self.holders[name].append(module)
        self.tensors = plan.tensors
        self.replay = Replay(reuse)
        self.padding = Padding(model)
        self.signatures: dict[str, tuple[int, ...]] = {}
        self.once: set[int] = set()
        self.current = 0  # the number of the batch that is running
        kinds = [_kind(batch) for batch in self.batches]
        self._kinds = [kinds.index(kind) for kind in kinds]  # of each batch, by the first one of its kind
        self._samples = sorted({i for kind in set(self._kinds) for i in self._extremes(kind)})
        self._unlike = False  # what the samples have shown does not hold for the batch that is running
        self._options = no_cache(model)
        self._without_logits = {**self._options, **no_logits(model, wanted)}
        self.tokens: dict[str, int] = {}
        self._context = ExitStack()

    def _extremes(self, kind: int) -> Iterator[int]:
        """The first, the smallest and the largest batch of a kind: some models treat long inputs in another way."""
        numbers = [i for i, of_batch in enumerate(self._kinds) if of_batch == kind]
        sizes = {i: sum(v.numel() for v in self.batches[i].values() if isinstance(v, Tensor)) for i in numbers}
        yield from (kind, min(numbers, key=sizes.__getitem__), max(numbers, key=sizes.__getitem__))

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
            warn_user(
                f"{len(few)} of {len(self.tensors)} targets are experts that saw fewer calibration tokens than they "
                f"have inputs ({'; '.join(few[:3])}{'; …' if len(few) > 3 else ''}): their statistics are uncertain, "
                f"and only damping makes up for it; calibrate on more texts, or name them in exclude_modules",
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
        seen: dict[str, int] = {}  # by name, which input it got first
        last: list[tuple[Tensor, object]] = []  # the last input: kept alive, so that no other tensor can take its place
        tokens = [0]
        signatures: dict[str, list[int]] = {}
        calls: dict[int, dict[int, int]] = {}  # how often each module was called, in the order of the first calls

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, tensor = first_input(args, kwargs), by_module[id(module)]
            same = bool(last) and last[0][0] is x and last[0][1] == tensor_version(x)
            tokens[0] += not same
            name = tensor.target.name
            if self.current in calls:
                signatures.setdefault(name, []).append(tokens[0])
            last[:] = [(x, tensor_version(x))]
            if name not in seen:
                seen[name] = tokens[0]
                if steps and seen[steps[-1][0].target.name] == tokens[0]:
                    steps[-1].append(tensor)
                else:
                    steps.append([tensor])

        def count(module: nn.Module, _: Any) -> None:
            of_batch = calls[self.current]
            of_batch[id(module)] = of_batch.get(id(module), 0) + 1

        targets = [module for modules in self.holders.values() for module in modules]
        lists = outer_lists(self.model, {id(module) for module in targets})
        for index, batch in enumerate(self.batches):
            sample = index in self._samples
            if not sample and len(seen) == len(self.tensors):
                continue
            self.current = index
            with ExitStack() as hooks:
                for module in targets:
                    hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
                if sample:
                    calls[index] = {}
                    for module in self.model.modules():
                        hooks.callback(module.register_forward_pre_hook(count).remove)
                self._forward(batch)
            last.clear()
        self.signatures = {name: tuple(numbers) for name, numbers in signatures.items()}
        called = {key for of_batch in calls.values() for key in of_batch}
        self.once = {key for key in called if all(of_batch.get(key, 1) == 1 for of_batch in calls.values())}
        steps = [part for step in steps for part in self._apart(step)]
        missing = [t for t in self.tensors if t.target.name not in seen]
        if missing:
            self._tell_of_missing(missing, called, warned)
        steps += [[t] for t in missing]
        for blocks in lists:
            if (stack := self._stack(blocks, calls)) is not None:
                self.replay.add(stack)
        return steps

    def _tell_of_missing(self, missing: Sequence[PlannedTensor], called: set[int], warned: bool) -> None:
        """Refuse, or warn of, targets that no batch reaches, and say where what holds them ran without calling them."""
        names = first_few([t.target.name for t in missing])
        found = f"no calibration batch reached {len(missing)} of {len(self.tensors)} targets ({names}): "
        passed = {}
        for t in missing:
            holder = self.model.get_submodule(t.target.module.rpartition(".")[0])
            if id(holder) in called and t.target.module:
                passed[t.target.module] = f"{type(holder).__module__}.{type(holder).__name__}"
        kinds = ", ".join(sorted(set(passed.values())))
        if any(module.endswith(".base_layer") for module in passed):
            raise CalibrationError(
                f"{found}the adapters around them ({kinds}) read their weights without calling them, so nothing flows "
                f"into them; prune before get_peft_model(), or merge_and_unload() first, or choose a criterion without "
                f"data"
            )
        if warned:
            why = f"; {kinds} ran without calling {', '.join(list(passed)[:3])}" if passed else ""
            warn_user(f"{found}they are pruned as if all their inputs were alike{why}")

    def _apart(self, step: Sequence[PlannedTensor]) -> Iterator[list[PlannedTensor]]:
        """Targets that get the same input, but for those that change it in another place, as tied and shared ones."""
        together: list[PlannedTensor] = []
        for tensor in step:
            (user, *others) = self.users[tensor.target.name]
            if others or id(user) not in self.once:
                if together:
                    yield together
                yield [tensor]
                together = []
            else:
                together.append(tensor)
        if together:
            yield together

    def _stack(self, blocks: Sequence[nn.Module], calls: Mapping[int, Mapping[int, int]]) -> BlockSequence | None:
        """The blocks of a list as a stack, if batches call all of them once and in the same order, or none."""
        by_id = {id(block): block for block in blocks}
        orders = {batch: [key for key in of_batch if key in by_id] for batch, of_batch in calls.items()}
        samples = [batch for batch, order in orders.items() if order]
        kinds = frozenset(self._kinds[batch] for batch in samples)
        alike = [orders[batch] == orders[samples[0]] for batch in calls if self._kinds[batch] in kinds]
        once = all(calls[batch][key] == 1 for batch in samples for key in orders[batch])
        if not samples or not once or not all(alike) or len(orders[samples[0]]) != len(by_id):
            return None
        ordered = [by_id[key] for key in orders[samples[0]]]
        names = {id(module): name for name, modules in self.holders.items() for module in modules}
        targets = [{names[key] for module in block.modules() if (key := id(module)) in names} for block in ordered]
        return BlockSequence(ordered, targets, kinds, samples, self._shelf())

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
        while self.replay.behind():
            self.repeated(lambda: self.run([], range(len(self.batches))))

    def repeated(self, attempt: Callable[[], Result]) -> Result:
        """What a function returns that runs batches; called again where replayed blocks turn out to make a difference.

        Args:
            attempt: Starts from nothing each time.
        """
        while True:
            try:
                return attempt()
            except NotAlikeError:  # from now on, what made the difference is computed
                continue

    def verify(self) -> bool:
        """Whether the blocks of all stacks may be replayed, wherever pruning has come to."""
        return all([all(self._check(stack)) for stack in self.replay.stacks])

    def _check(self, stack: BlockSequence) -> list[bool]:
        """Which blocks of a stack may be replayed; tried if nobody has."""
        if stack.alike is None:
            with fail_together():
                alike = self.replay.check(stack, self._tracer())
            stack.alike = broadcast(torch.tensor(alike)).tolist()  # the same in all processes
        return stack.alike

    def _tracer(self) -> Tracer:
        layouts = {id(m): t.target.layout for t in self.tensors for m in self.holders[t.target.name]}

        def read(module: nn.Module, x: Any) -> Tensor | None:
            if not isinstance(x, Tensor) or x.dim() == 0:
                return None
            return x.movedim(1, -1) if layouts.get(id(module)) == "conv" else self.padding.rows(module, x)

        blocks = [block for stack in self.replay.stacks for block in stack.blocks]
        return Tracer(lambda i: self._forward(self.batches[i]), self.holders, self.users, blocks, read)

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
        sums = self.repeated(lambda: self._sums(tensors, needs, progress))
        found = {}
        for t in tensors:
            name = t.target.name
            found[name] = sums[name].statistics(needs, device_of(self.holders[name][0]))
            self.tokens[name] = sums[name].tokens
            check_finite(name, found[name])
        return found

    def _sums(
        self, tensors: Sequence[PlannedTensor], needs: frozenset[str], progress: bool
    ) -> dict[str, InputAccumulator]:
        sums: dict[str, InputAccumulator] = {}
        by_signature: dict[tuple[int, ...], Leader] = {}
        leaders: list[Leader] = []
        watchers: list[Watcher] = []
        for t in tensors:
            name, layout = t.target.name, t.target.layout
            signature = self.signatures.get(name)
            leader = by_signature.get(signature) if signature is not None else None
            if leader is None:
                sums[name] = InputAccumulator(needs, t.target.matrix_shape[1])
                leader = Leader(sums[name], self.padding, layout)
                leaders.append(leader)
                if signature is not None:
                    by_signature[signature] = leader
                call = leader.add
            else:  # the same inputs: gathered once
                sums[name] = leader.total
                call = leader.follower()
            watchers += [Watcher(module, call) for module in self.holders[name]]

        def after_batch() -> None:
            agreed = [leader.end_batch() for leader in leaders]
            self._unlike |= not all(agreed)

        self.run(watchers, range(len(self.batches)), progress, after_batch=after_batch)
        for leader in leaders:
            leader.total.add_others(self.device)
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
        if record:
            for stack in self.replay.behind():
                self._check(stack)
        if self.replay.active:
            watchers = [replace(watcher, call=self._guarded(watcher.call)) for watcher in watchers]
        stop_after: set[object] | None = None
        # A run may stop early only if no further call is to come, as far as the samples show.
        if all(id(watcher.module) in self.once for watcher in watchers):
            stop_after = {watcher for watcher in watchers if watcher.waits}
        advancing = self.replay.behind() if record else []
        self._unlike = False
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
            with fail_together():
                for index in Bar(rank_items(batches), desc="Calibrating", progress=progress):
                    self.current = index
                    left.clear()
                    left |= stop_after or set()
                    self._run_one(index)
                    if after_batch is not None and not self._unlike:
                        after_batch()
                    if self._unlike:
                        break
        if int(all_reduce_sum(torch.tensor(int(self._unlike)))):  # in any process
            self.replay.give_up()
            self.signatures.clear()
            raise NotAlikeError
        for stack in advancing:
            self.replay.stop_recording(stack, sum(kind in stack.kinds for kind in self._kinds))

    def _run_one(self, index: int) -> None:
        """Run a batch, and say if it does not go as replayed blocks expect."""
        self.replay.start_batch()
        stopped = False
        try:
            self._forward(self.batches[index])
        except Stop:
            stopped = True
        except Exception:
            if not self.replay.active:
                raise
            self._unlike = True
        self._unlike |= not self.replay.is_complete(self._kinds[index], stopped)

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """What a watcher calls, unless what comes to it depends on what blocks that are replayed would put out."""

        def guarded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            for x in (first_input(args, kwargs), None if output is None else first_tensor(output)):
                if isinstance(x, Tainted):
                    self._unlike = True
                    raise Stop
            return call(module, args, kwargs, output)

        return guarded

    @torch.no_grad()
    def _forward(self, batch: Mapping[str, Any]) -> None:
        """Run a batch for its hooks alone; where it has labels, the loss needs every logit."""
        self._call(batch, self._options if "labels" in batch else self._without_logits)

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """What the model puts out for a batch, whose padding :attr:`padding` then knows."""
        return self._call(batch, self._options)

    def _call(self, batch: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        inputs = batch_to_device(self.model, batch, self.device)
        with self.padding.of(inputs):
            return run_model(self.model, {**options, **inputs})


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


def _kind(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """What batches have in common that a model is likely to treat alike: names, dtypes and dimensions."""
    return tuple(
        (name, type(value), (value.dtype, value.dim()) if isinstance(value, Tensor) else None)
        for name, value in sorted(batch.items())
    )
