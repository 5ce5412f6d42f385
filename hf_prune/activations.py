"""What flows into each target while calibration batches run through the model; padding is left out.

The model is always run as its author wrote it, with hooks on the targets, and stopped once the targets of interest
have been called. That is right for every architecture, and slow for the last layers of a deep one. So the blocks
of a stack (the elements of a ModuleList) that are finished, because all targets in them are pruned, are not computed
again: all of them return what the last of them put out. This holds where each block is called once and later modules
see nothing of the blocks before but the output of the last one. It is checked on the first batch each time another
block is finished: if the inputs of the next targets differ from those of a run in which that block is still computed,
every block is computed from then on.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_prune.distributed import add_up, all_or_none, processes, share
from hf_prune.errors import CalibrationError
from hf_prune.plan import PlannedTensor, PruningPlan
from hf_prune.spill import Shelf
from hf_prune.sums import InputSum
from hf_prune.targets import is_finite

Batches = Iterable[Mapping[str, Any]]
NO_BATCHES = "calibration has no batches: expected at least one; a used-up generator yields none"

Statistics = dict[str, dict[str, Tensor]]
_NUMBER = re.compile(r"\d+")

CACHE_BYTES = 256 * 2**20  # of what finished blocks put out, in memory; what is beyond it goes to a temporary folder


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's own flag back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def on_device(model: nn.Module, batch: object) -> dict[str, Any]:
    """A batch as keyword arguments, on the model's device.

    Raises:
        CalibrationError: If it is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise CalibrationError(f"a calibration batch is a {type(batch).__name__}: expected a dict of model inputs")
    device = _device(model)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _device(model: nn.Module) -> torch.device:
    """Where a model computes; weights that are not loaded lie on no device."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


@dataclass
class _Stack:
    """Blocks that run one after the other.

    Args:
        blocks: In the order of their calls.
        targets: Names of the parameters in each block that have yet to be pruned.
        outputs: What the last of the blocks that are not computed any more put out, for each batch.
        replayed: How many blocks are not computed any more.
        recorded: Batches for which a run in progress has replaced it.
        before: What ``replayed`` and the first of ``outputs`` were before they last changed.
    """

    blocks: list[nn.Module]
    targets: list[set[str]]
    outputs: Shelf
    replayed: int = 0
    recorded: set[int] = field(default_factory=set)
    before: tuple[int, Any] = (0, None)

    @property
    def finished(self) -> int:
        """How many blocks have no target left before the first one that has."""
        return next((i for i, names in enumerate(self.targets) if names), len(self.blocks))

    def state(self, batch: int) -> tuple[int, Any]:
        """How many blocks are replayed, and what they put out for a batch, if this process has it."""
        return self.replayed, self.outputs.get(batch) if batch in self.outputs else None


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
        self.stacks: list[_Stack] = []
        self.signatures: dict[str, tuple[int, ...]] = {}
        self.once: set[int] = set()
        self.encoder = _encoder_modules(model)
        self._encoder_output: Tensor | None = None
        self._mask: Tensor | None = None
        self._size = 0  # examples in the batch that is running
        self._decoder_mask: Tensor | None = None
        self._first = processes()[0]  # the first batch of this process
        self.current = 0  # the number of the batch that is running
        self._unchecked = False
        self._options = _lean_options(model, wanted)
        self.tokens: dict[str, int] = {}
        self._context = ExitStack()

    def __enter__(self) -> InputReader:
        self._context.enter_context(eval_mode(self.model))
        self._context.callback(self._close_stacks)
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
                    self.stacks.append(_Stack(ordered, targets_of, self._shelf()))
        return steps

    def _targets_in(self, block: nn.Module) -> set[str]:
        inside = {id(module) for module in block.modules()}
        return {name for name, modules in self.holders.items() if any(id(module) in inside for module in modules)}

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return _device(self.model)

    def block_of(self, name: str) -> nn.Module | None:
        """The block that holds a target in all its uses, where what runs before it need not be computed again."""
        for stack in self.stacks:
            for block in stack.blocks:
                inside = {id(module) for module in block.modules()}
                if all(id(module) in inside for module in self.holders[name]):
                    return block
        return None

    def finish(self, tensors: Iterable[PlannedTensor]) -> None:
        """Say that these targets have their final weights, so that blocks without others need not run again."""
        names = {t.target.name for t in tensors}
        for stack in self.stacks:
            for left in stack.targets:
                left -= names

    def advance(self) -> None:
        """Have the finished blocks put out what later runs replay, without computing anything after them.

        :meth:`gather` does so on the way; done apart, the weights of one block suffice at a time.
        """
        if any(stack.finished > stack.replayed for stack in self.stacks):
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
        if self._unchecked:
            self._check(tensors, needs)
        sums = self._run(tensors, needs, range(len(self.batches)), progress=progress)
        found = {}
        for t in tensors:
            name = t.target.name
            found[name] = sums[name].statistics(needs, _device(self.holders[name][0]))
            self.tokens[name] = sums[name].tokens
            check_finite(name, found[name])
        return found

    def _check(self, tensors: Sequence[PlannedTensor], needs: frozenset[str]) -> None:
        """Compare what the first batch gives with and without the blocks replayed last, and give up if it differs."""
        self._unchecked = False
        firsts = range(min(processes()[1], len(self.batches)))  # the first of each process
        now = self._run(tensors, needs, firsts, record=False)
        after = [stack.state(self._first) for stack in self.stacks]
        self._set_replayed([stack.before for stack in self.stacks])
        before = self._run(tensors, needs, firsts, record=False)
        self._set_replayed(after)
        if not all(_alike(expected.sums, now[name].sums) for name, expected in before.items()):
            self._give_up(self.stacks)

    def _set_replayed(self, states: Iterable[tuple[int, Any]]) -> None:
        for stack, (replayed, output) in zip(self.stacks, states, strict=True):
            stack.replayed = replayed
            if output is not None:
                stack.outputs.put(self._first, output)

    def _close_stacks(self) -> None:
        for stack in self.stacks:
            stack.outputs.close()

    def _give_up(self, stacks: Iterable[_Stack]) -> None:
        for stack in list(stacks):
            stack.outputs.close()
            self.stacks.remove(stack)

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
        device = _device(self.model)
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
        advancing = []
        with ExitStack() as hooks:
            left: set[object] = set()
            for watcher in watchers:
                watcher.install(hooks, left if stop_after is not None else None)
            for stack in self.stacks:
                replay, replay_last = self._replays(stack)
                for i, block in enumerate(stack.blocks[: stack.replayed], start=1):
                    forward = replay_last if i == stack.replayed else replay
                    hooks.enter_context(replaced_forward(block, forward))
                if record and stack.finished > stack.replayed:
                    advancing.append(stack)
                    stack.before = stack.state(self._first)
                    last = stack.blocks[stack.finished - 1]
                    recorder = Watcher(last, self._record_in(stack), after=True)
                    recorder.install(hooks, left if stop_after is not None else None)
                    if stop_after is not None:
                        stop_after.add(recorder)
            hidden = None if progress else True  # None: shown on a terminal
            with all_or_none():
                for index in tqdm(share(batches), desc="Calibrating", unit="batch", leave=False, disable=hidden):
                    self.current = index
                    left |= stop_after or set()
                    try:
                        self._forward(self.batches[index])
                    except _Stop:
                        pass
                    if after_batch is not None:
                        after_batch()
        for stack in advancing:
            recorded = int(add_up(torch.tensor(len(stack.recorded))))
            if recorded == len(self.batches):
                stack.replayed, self._unchecked = stack.finished, True
            elif recorded:  # not every batch calls it
                self._give_up([stack])
            stack.recorded.clear()

    def _reader(self, total: InputSum, layout: str) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            total.add(self.rows(module, first_input(args, kwargs), layout))

        return read

    def _replays(self, stack: _Stack) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What blocks that are not computed any more do instead: all but the last of them, and the last.

        What the others put out is never looked at, so they share one copy, which a block between them may have changed:
        a deep model reads what it replays twice for each batch, not once for each block.
        """
        shared: list[tuple[int, Any]] = [(-1, None)]

        def replay(*args: Any, **kwargs: Any) -> Any:
            if shared[0][0] != self.current:
                shared[0] = self.current, stack.outputs.get(self.current)
            return shared[0][1]

        return replay, lambda *args, **kwargs: stack.outputs.get(self.current)

    def _record_in(self, stack: _Stack) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            stack.outputs.put(self.current, output)
            stack.recorded.add(self.current)

        return record

    @torch.no_grad()
    def _forward(self, batch: Mapping[str, Any]) -> None:
        self.forward(batch, {k: v for k, v in self._options.items() if k != "logits_to_keep" or "labels" not in batch})

    def forward(self, batch: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Any:
        """What the model puts out for a batch, whose padding :meth:`rows` then knows.

        Args:
            batch: The batch.
            options: Other arguments of the model.
        """
        inputs = on_device(self.model, batch)
        self._size = next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 0)
        self._mask = _mask(inputs.get("attention_mask"))
        self._decoder_mask = _mask(inputs.get("decoder_attention_mask"))
        self._encoder_output = None

        def keep_output(_: nn.Module, __: Any, output: Any) -> None:
            first = first_tensor(output)
            self._encoder_output = first if isinstance(first, Tensor) else None

        with ExitStack() as hooks:
            if self.encoder is not None:
                hooks.callback(self.encoder[0].register_forward_hook(keep_output).remove)
            lean = {name: value for name, value in self._options.items() if name == "use_cache"}
            return self.model(**{**lean, **(options or {}), **inputs})

    def rows(self, module: nn.Module, x: Tensor, layout: str = "linear") -> Tensor:
        """(tokens, in): what a module multiplies, without padding."""
        if layout == "conv":
            return _columns(module, x)
        mask = self.mask(module, x)
        rows = x.reshape(-1, x.shape[-1])
        return rows if mask is None else rows[mask]

    def in_place(self, x: Tensor, layout: str = "linear") -> bool:
        """Whether a row of a module's inputs is the same token in every run: not so where a router chooses the rows."""
        masks = [mask.numel() for mask in (self._mask, self._decoder_mask) if mask is not None]
        return layout == "conv" or x.dim() > 2 or len(x) in (self._size, *masks)

    def mask(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """(tokens,) bool: which of a module's inputs are no padding; None if all are.

        Args:
            module: A module of the model, while that runs.
            x: (batch, seq, in) or (batch * seq, in) what flows into it.
        """
        mask = self._mask
        if self.encoder is not None and id(module) not in self.encoder[1]:
            encoded = self._encoder_output
            if encoded is None or x.data_ptr() != encoded.data_ptr() or x.shape != encoded.shape:
                mask = self._decoder_mask
        if mask is None:
            return None
        fits = x.shape[:2] == mask.shape if x.dim() == 3 else x.dim() == 2 and len(x) == mask.numel()
        return mask.reshape(-1) if fits else None


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


def _alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether sums are the same but for rounding."""
    return a.keys() == b.keys() and all(bool((a[k] - b[k]).abs().max() <= 1e-3 * a[k].abs().max()) for k in a)


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a module multiplies: its first argument."""
    return args[0] if args else next(iter(kwargs.values()))


def first_tensor(output: Any) -> Any:
    """What a module hands on: its output, or the first part of it."""
    return output if isinstance(output, Tensor) else output[0]


def _mask(mask: Any) -> Tensor | None:
    """(batch, seq) bool, True for tokens, if it is such a mask."""
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _columns(module: nn.Module, x: Tensor) -> Tensor:
    """(positions, kernel * in): what a convolution multiplies, its columns ordered like a target's matrix.

    Args:
        module: A convolution of one, two or three dimensions, with one group.
        x: (batch, in, *size), or without the batch.
    """
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    dims = len(module.kernel_size)
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, step, gap) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(dim + 2, (size - 1) * gap + 1, step)[..., ::gap]
    # (batch, in, *positions, *kernel) -> (batch, *positions, *kernel, in)
    return x.movedim(1, -1).reshape(-1, module.in_channels * x.shape[-dims:].numel())


def outer_lists(model: nn.Module, targets: set[int]) -> list[list[nn.Module]]:
    """The elements of every ModuleList that holds targets and lies in no other such list."""
    found: list[list[nn.Module]] = []
    inside: set[int] = set()
    for module in model.modules():  # parents come first
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            below = {id(part) for part in module.modules()}
            if below & targets:
                found.append(list(module))
                inside |= below
    return found


def _lean_options(model: nn.Module, targets: set[str]) -> dict[str, Any]:
    """Arguments with which a language model computes no cache and no more logits than it must: nobody looks at them."""
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if "logits_to_keep" in known and head is not None:
        names = {name for name, parameter in model.named_parameters() if any(parameter is p for p in head.parameters())}
        if not names & targets:
            options["logits_to_keep"] = 1
    return options


def _encoder_modules(model: nn.Module) -> tuple[nn.Module, set[int]] | None:
    """The encoder, and the ids of all its modules, where a model has a decoder as well: the rest sees its tokens."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder, decoder = (getattr(model, f"get_{part}", lambda: None)() for part in ("encoder", "decoder"))
    if encoder is None or decoder is None:
        return None
    return encoder, {id(module) for module in encoder.modules()}


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Call another forward inside, and leave the module as it was."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
