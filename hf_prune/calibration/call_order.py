"""Which modules call a target, in which order, and on which input tensor: observed on batches, not assumed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_prune.calibration.batch_runner import BatchRunner
from hf_prune.calibration.hooks import tensor_version
from hf_prune.calibration.padding import first_input
from hf_prune.calibration.slabs import Slab
from hf_prune.kernels.matrix import Target
from hf_prune.planning.prunable import prunable_weights

Modules = Mapping[str, Sequence[nn.Module]]  # by the name of a target


@dataclass(frozen=True)
class CallOrder:
    """What batches call.

    Args:
        steps: The targets in the order of their first calls; neighbours on the same input tensor come together.
        inputs: By target, the numbers of the input tensors that its calls on the sample batches got: targets with the
            same numbers have the same inputs.
        counts: By sample batch, how often it called each module (by id), in the order of the first calls.
    """

    steps: list[list[Target]]
    inputs: dict[str, tuple[int, ...]]
    counts: dict[int, dict[int, int]]

    @property
    def called(self) -> set[int]:
        """Ids of the modules that any sample called."""
        return {key for of_batch in self.counts.values() for key in of_batch}

    @property
    def once(self) -> set[int]:
        """Ids of the modules that samples call, each of them once at most."""
        return {key for key in self.called if all(of_batch.get(key, 1) == 1 for of_batch in self.counts.values())}

    def repeats(self, module: nn.Module) -> bool:
        """Whether a sample called a module more than once."""
        return any(of_batch.get(id(module), 0) > 1 for of_batch in self.counts.values())


def find_users(model: nn.Module, targets: Collection[Target]) -> tuple[Modules, Modules]:
    """The modules that multiply with each target, and all that have it as a parameter.

    The two differ for a tied embedding, which looks its rows up, and for a packed parameter, for which
    :class:`~hf_prune.calibration.slabs.PackedTarget` has modules that multiply.
    """
    wanted = {t.name for t in targets}
    names = {id(parameter): name for name, parameter in model.named_parameters() if name in wanted}
    multiply = {id(weight.module): weight for weight in prunable_weights(model) if weight.called}
    holders: dict[str, list[nn.Module]] = {name: [] for name in wanted}
    users: dict[str, list[nn.Module]] = {name: [] for name in wanted}
    for module in model.modules():
        for parameter in module._parameters.values():
            if (name := names.get(id(parameter))) is not None:
                users[name].append(module)
    for module in model.modules():
        if id(module) in multiply and (name := names.get(id(multiply[id(module)].weight))) is not None:
            holders[name].append(module)
    return holders, users


def observe_calls(runner: BatchRunner, targets: Sequence[Target], holders: Modules) -> CallOrder:
    """Run the sample batches, and others only until every target was called.

    Args:
        runner: Runs the batches; no block is replayed yet.
        targets: What to look for.
        holders: The modules that multiply with each target.
    """
    by_module = {id(module): t for t in targets for module in holders[t.name]}
    modules = [module for of_target in holders.values() for module in of_target]
    log = _InputLog()
    counts: dict[int, dict[int, int]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        target, x = by_module[id(module)], first_input(args, kwargs)
        runner.routed |= not runner.padding.in_place(x, target.layout)
        log.note(target, x, runner.current in counts)

    def count(module: nn.Module, _: Any) -> None:
        of_batch = counts[runner.current]
        of_batch[id(module)] = of_batch.get(id(module), 0) + 1

    for index in range(len(runner.batches)):
        sample = index in runner.samples
        if not sample and len(log.seen) == len(targets):
            continue
        with ExitStack() as hooks:
            for module in modules:
                hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
            if sample:
                counts[index] = {}
                for module in (*runner.model.modules(), *(m for m in modules if isinstance(m, Slab))):
                    hooks.callback(module.register_forward_pre_hook(count).remove)
            runner.run_batch(index)
        log.end_batch()
    return CallOrder(log.steps, {name: tuple(numbers) for name, numbers in log.inputs.items()}, counts)


def split_shared(steps: Sequence[Sequence[Target]], users: Modules, once: Collection[int]) -> list[list[Target]]:
    """Steps in which a target that other calls use as well is alone: pruning it changes what those return.

    Args:
        steps: Targets with the same input.
        users: The modules that have each target.
        once: Ids of the modules that batches call once at most.
    """

    def split(step: Sequence[Target]) -> Iterator[list[Target]]:
        together: list[Target] = []
        for target in step:
            user, *more = users[target.name]
            if more or id(user) not in once:
                if together:
                    yield together
                yield [target]
                together = []
            else:
                together.append(target)
        if together:
            yield together

    return [part for step in steps for part in split(step)]


class _InputLog:
    """Numbers the input tensors of targets, and lists the targets in the order of their first calls."""

    def __init__(self) -> None:
        self.steps: list[list[Target]] = []
        self.inputs: dict[str, list[int]] = {}
        self.seen: set[str] = set()
        self._number = 0  # of the last input
        self._step_number = 0  # of the input of the last step
        self._last: tuple[Tensor, object] | None = None  # kept alive, so that no other tensor can take its place

    def note(self, target: Target, x: Tensor, sample: bool) -> None:
        """Note one call of a target, and the number of its input if the batch is a sample."""
        version = tensor_version(x)
        if self._last is None or self._last[0] is not x or self._last[1] != version:
            self._number += 1
        self._last = (x, version)
        if sample:
            self.inputs.setdefault(target.name, []).append(self._number)
        if target.name in self.seen:
            return
        self.seen.add(target.name)
        if self.steps and self._step_number == self._number:
            self.steps[-1].append(target)
        else:
            self.steps.append([target])
            self._step_number = self._number

    def end_batch(self) -> None:
        """Forget the last input."""
        self._last = None
