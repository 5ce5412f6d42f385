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
from hf_prune.targets import is_finite

Batches = Iterable[Mapping[str, Any]]
NO_BATCHES = "calibration has no batches: expected at least one; a used-up generator yields none"

Statistics = dict[str, dict[str, Tensor]]
_NUMBER = re.compile(r"\d+")
_ROWS = 256  # of a Gram matrix that are added at a time

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


def sum_dtype(device: torch.device) -> torch.dtype:
    """In what to add up what each batch gives in float32: float64, which keeps nearly always every bit of the sum.

    So the order of the batches does not matter, nor how they are shared between processes.
    """
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


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


class _Sum:
    """Products of inputs, added up.

    Those of a batch are computed in float32; see :func:`sum_dtype` for the rest.
    """

    def __init__(self, needs: Iterable[str], inputs: int) -> None:
        self.gram = "input_gram" in needs
        self.inputs = inputs
        self.total: Tensor | None = None
        self.mean: Tensor | None = None
        self.tokens = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """(tokens, in)."""
        x = x.float()
        total = self._start(x.device)
        if self.gram:
            for rows in range(0, self.inputs, _ROWS):  # so that the products of a batch take little memory
                total[rows : rows + _ROWS].add_(x[:, rows : rows + _ROWS].t() @ x)
        else:
            total.add_((x * x).sum(0))
        self.tokens += len(x)

    def _start(self, device: torch.device) -> Tensor:
        if self.total is None:
            size = (self.inputs, self.inputs) if self.gram else (self.inputs,)
            self.total = torch.zeros(size, dtype=sum_dtype(device), device=device)
        return self.total

    def add_others(self, device: torch.device) -> None:
        """Add what the other processes have seen."""
        self.tokens = int(add_up(torch.tensor(self.tokens)))
        if self.tokens:
            self.total = add_up(self._start(device))

    def statistics(self, needs: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """The mean; as if inputs were independent and alike where none was ever seen."""
        if self.tokens == 0:
            mean = torch.eye(self.inputs, device=device) if self.gram else torch.ones(self.inputs, device=device)
        else:
            if self.mean is None:  # targets with the same inputs share it
                assert self.total is not None
                self.mean, self.total = self.total.div_(self.tokens).float(), None
            mean = self.mean
        square = mean.diagonal() if self.gram else mean
        values = {"input_gram": mean, "input_norm": square.sqrt()}
        return {need: values[need] for need in needs}


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
        self.decoder = _decoder_modules(model)
        self._encoder_output: Tensor | None = None
        self._mask: Tensor | None = None
        self._decoder_mask: Tensor | None = None
        self._first = processes()[0]  # the first batch of this process
        self._unchecked = False
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

    def order(self) -> list[list[PlannedTensor]]:
        """The targets in the order of their calls; neighbours that get the same input tensor come together.

        Targets that no batch reaches come last, with a warning: their inputs are taken to be alike.
        """
        by_module = {id(module): t for t in self.tensors for module in self.holders[t.target.name]}
        steps: list[list[PlannedTensor]] = []
        seen: set[str] = set()
        last: list[Tensor] = []  # the last input: kept alive, so that no other tensor can take its place
        tokens = [0]
        signatures: dict[str, list[int]] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, tensor = _input(args, kwargs), by_module[id(module)]
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
        lists = _outer_lists(self.model, {id(module) for module in targets})
        blocks = {id(block) for blocks in lists for block in blocks}
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
                        if id(module) in blocks or id(module) in by_module:
                            hooks.callback(module.register_forward_pre_hook(count).remove)
                self._forward(batch)
            if index == 0:
                self.signatures = {name: tuple(tokens) for name, tokens in signatures.items()}
                order = list(calls)
            if len(seen) == len(self.tensors):
                break
        self.once = {key for key, number in calls.items() if number == 1}
        if missing := [t for t in self.tensors if t.target.name not in seen]:
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
            if not all(is_finite(value) for value in found[name].values()):
                raise CalibrationError(
                    f"the inputs of {name} are not finite: expected finite values; calibrate in float32 or bfloat16, "
                    f"and check the batches"
                )
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
        for name, expected in before.items():
            if (a := expected.total) is None or (b := now[name].total) is None:
                alike = expected.total is now[name].total
            else:
                alike = bool((a - b).abs().max() <= 1e-3 * a.abs().max())
            if not alike:
                self._give_up(self.stacks)
                return

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
    ) -> dict[str, _Sum]:
        sums: dict[str, _Sum] = {}
        by_signature: dict[tuple[int, ...], str] = {}
        watched: list[tuple[nn.Module, _Sum, str]] = []
        for t in tensors:
            name = t.target.name
            signature = self.signatures.get(name)
            if signature is not None and signature in by_signature:  # the same inputs: gathered once
                sums[name] = sums[by_signature[signature]]
                continue
            if signature is not None:
                by_signature[signature] = name
            sums[name] = _Sum(needs, t.target.matrix_shape[1])
            watched += [(module, sums[name], t.target.layout) for module in self.holders[name]]
        stop_after: set[int] | None = None
        # A run may stop early only if no further call is to come, as far as the first batch shows.
        if watched and all(id(module) in self.once for module, _, _ in watched):
            stop_after = {id(module) for module, _, _ in watched}
        advancing = []
        with ExitStack() as hooks:
            left: set[int] = set()
            for module, total, layout in watched:
                hook = self._reader(total, layout, left if stop_after is not None else None)
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            current = [0]
            for stack in self.stacks:
                for block in stack.blocks[: stack.replayed]:
                    hooks.enter_context(replaced_forward(block, _replay(stack, current)))
                if record and stack.finished > stack.replayed:
                    advancing.append(stack)
                    stack.before = stack.state(self._first)
                    last = stack.blocks[stack.finished - 1]
                    hook = _recorder(stack, current, None if watched else left)
                    hooks.callback(last.register_forward_hook(hook).remove)
            if not watched:
                stop_after = {id(stack.blocks[stack.finished - 1]) for stack in advancing}
            hidden = None if progress else True  # None: shown on a terminal
            with all_or_none():
                for index in tqdm(share(batches), desc="Calibrating", unit="batch", leave=False, disable=hidden):
                    current[0] = index
                    left |= stop_after or set()
                    try:
                        self._forward(self.batches[index])
                    except _Stop:
                        pass
        device = _device(self.model)
        for total in {id(total): total for total in sums.values()}.values():
            total.add_others(device)
        for stack in advancing:
            recorded = int(add_up(torch.tensor(len(stack.recorded))))
            if recorded == len(self.batches):
                stack.replayed, self._unchecked = stack.finished, True
            elif recorded:  # not every batch calls it
                self._give_up([stack])
            stack.recorded.clear()
        return sums

    def _reader(self, total: _Sum, layout: str, left: set[int] | None) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _input(args, kwargs)
            total.add(_columns(module, x) if layout == "conv" else self._rows(module, x))
            _done(left, module)

        return read

    @torch.no_grad()
    def _forward(self, batch: Mapping[str, Any]) -> None:
        inputs = on_device(self.model, batch)
        self._mask = _mask(inputs.get("attention_mask"))
        self._decoder_mask = _mask(inputs.get("decoder_attention_mask"))
        self._encoder_output = None

        def keep_output(_: nn.Module, __: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            self._encoder_output = first if isinstance(first, Tensor) else None

        with ExitStack() as hooks:
            if self.decoder is not None:
                hooks.callback(self.decoder[0].register_forward_hook(keep_output).remove)
            self.model(**inputs)

    def _rows(self, module: nn.Module, x: Tensor) -> Tensor:
        """(tokens, in): the inputs of a Linear without those of padding."""
        mask = self._mask
        if self.decoder is not None and id(module) in self.decoder[1]:
            encoded = self._encoder_output
            if encoded is None or x.data_ptr() != encoded.data_ptr() or x.shape != encoded.shape:
                mask = self._decoder_mask
        if mask is not None:
            if x.dim() == 3 and x.shape[:2] == mask.shape:
                return x[mask]
            if x.dim() == 2 and len(x) == mask.numel():
                return x[mask.reshape(-1)]
        return x.reshape(-1, x.shape[-1])


class _Stop(Exception):
    """Everything of interest was seen; never leaves this module."""


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


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


def _outer_lists(model: nn.Module, targets: set[int]) -> list[list[nn.Module]]:
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


def _decoder_modules(model: nn.Module) -> tuple[nn.Module, set[int]] | None:
    """The encoder, and the ids of all modules of the decoder, where a model has both."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder, decoder = (getattr(model, f"get_{part}", lambda: None)() for part in ("encoder", "decoder"))
    if encoder is None or decoder is None:
        return None
    return encoder, {id(module) for module in decoder.modules()}


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


def _replay(stack: _Stack, current: Sequence[int]) -> Callable[..., Any]:
    return lambda *args, **kwargs: stack.outputs.get(current[0])


def _recorder(stack: _Stack, current: Sequence[int], left: set[int] | None) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        stack.outputs.put(current[0], output)
        stack.recorded.add(current[0])
        _done(left, module)

    return record


def _done(left: set[int] | None, module: nn.Module) -> None:
    """Stop the run once every module that it is for has been called."""
    if left is not None:
        left.discard(id(module))
        if not left:
            raise _Stop
