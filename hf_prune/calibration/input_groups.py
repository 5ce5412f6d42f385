"""Targets that get the same input tensors: their statistics are gathered once, and it is checked that they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_prune.calibration.accumulators import SlabAccumulators
from hf_prune.calibration.hooks import Watcher, tensor_version
from hf_prune.calibration.padding import Padding, first_input
from hf_prune.calibration.slabs import slab_number
from hf_prune.kernels.matrix import Target

Calls = list[tuple[Tensor, object]]  # the input tensor of each call, and its version


class InputGroup:
    """Targets that get the same inputs. The calls of the first are added up, and those of the others compared.

    Args:
        accumulator: Where the inputs are added.
        padding: Knows which rows count.
        layout: Of the first target, as in :class:`~hf_prune.kernels.matrix.Target`.
    """

    def __init__(self, accumulator: SlabAccumulators, padding: Padding, layout: str) -> None:
        self.accumulator = accumulator
        self._padding, self._layout = padding, layout
        self._calls: list[Calls] = [[]]  # of each target, in the batch that is running

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        """Add the inputs of one call of the first target: a hook."""
        x = first_input(args, kwargs)
        self.accumulator.add(self._padding.rows(module, x, self._layout), slab=slab_number(module))
        self._calls[0].append((x, tensor_version(x)))

    def follow(self) -> Callable[..., None]:
        """A hook that notes the calls of one more target."""
        calls: Calls = []
        self._calls.append(calls)

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            x = first_input(args, kwargs)
            calls.append((x, tensor_version(x)))

        return note

    def end_batch(self) -> bool:
        """Whether all targets got the same tensors in the batch that has run."""
        seen = [[(id(x), version) for x, version in calls] for calls in self._calls]
        for calls in self._calls:
            calls.clear()
        return all(calls == seen[0] for calls in seen)


def group_by_input(
    targets: Sequence[Target],
    new: Callable[[Target], SlabAccumulators],
    inputs: Mapping[str, tuple[int, ...]],
    watch: Callable[[str, Callable[..., Any]], list[Watcher]],
    padding: Padding,
) -> tuple[list[InputGroup], dict[str, SlabAccumulators], list[Watcher]]:
    """Group targets by their inputs.

    Args:
        targets: The targets.
        new: Makes the accumulator of a group from its first target.
        inputs: By target, the numbers of its inputs; a target without is a group of its own.
        watch: Makes the hooks on all calls of a target.
        padding: Knows which rows count.

    Returns:
        The groups, the accumulator of each target, and the hooks that fill them.
    """
    groups: list[InputGroup] = []
    by_inputs: dict[tuple[int, ...], InputGroup] = {}
    accumulators: dict[str, SlabAccumulators] = {}
    watchers: list[Watcher] = []
    for t in targets:
        numbers = inputs.get(t.name)
        group = None if numbers is None or t.slabs > 1 else by_inputs.get(numbers)
        if group is None:
            group = InputGroup(new(t), padding, t.layout)
            groups.append(group)
            if numbers is not None and t.slabs == 1:
                by_inputs[numbers] = group
            call: Callable[..., None] = group.add
        else:
            call = group.follow()
        accumulators[t.name] = group.accumulator
        watchers += watch(t.name, call)
    return groups, accumulators, watchers
