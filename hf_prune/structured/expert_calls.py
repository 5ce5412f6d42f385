"""The calls of what reads the neurons of experts, and the examples that the tokens of each belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.moe_blocks import moe_blocks
from hf_prune.architectures.unit_groups import UnitGroup, UnitSlice
from hf_prune.calibration.routed_rows import RoutedRows
from hf_prune.calibration.slabs import SlabCalls, packed_targets
from hf_prune.errors import CalibrationError, PlanError
from hf_prune.planning.prunable import prunable_weights


class ExpertCalls:
    """Follows which tokens routers send to the experts of some groups, while a model runs.

    Args:
        model: The model.
        groups: Groups of units, of which some may be neurons of experts.

    Raises:
        PlanError: If nobody has said how the class of some packed experts multiplies.
    """

    def __init__(self, model: nn.Module, groups: Sequence[UnitGroup]) -> None:
        self._model = model
        self._lists = tuple(f"{name}." for block in moe_blocks(model) for name in block.lists)
        names = {piece.name: group for group in groups if group.choices for piece in group.consumers}
        by_id = {id(model.get_parameter(name)): name for name in names}
        weights = [weight for weight in prunable_weights(model) if id(weight.weight) in by_id]
        targets = [weight.target(by_id[id(weight.weight)]) for weight in weights if not weight.called]
        self._packed = packed_targets(model, targets)
        if missing := names.keys() - self._packed.keys():
            group = names[min(missing)]
            raise PlanError(
                f"the neurons of {group.name} cannot be watched, since nobody has said how its class multiplies: "
                f"choose magnitude or random, tell it with architectures.experts.register_packed, or spare the "
                f"experts with exclude_modules={[group.name]!r}"
            )
        self._rows = RoutedRows()
        self._calls = SlabCalls(self._packed.values(), self._rows)
        self._is_needed = bool(self._packed) or any(map(self.is_in_experts, groups))
        self._tokens: set[int] = set()

    def is_in_experts(self, group: UnitGroup) -> bool:
        """Whether the units of a group are neurons of experts, to which a router sends tokens."""
        names = [piece.name for piece in group.consumers]
        return bool(group.choices) or (bool(names) and all(name.startswith(self._lists) for name in names))

    def modules(self, consumer: UnitSlice) -> list[nn.Module]:
        """What is called with what a weight reads: its module, or one for each packed expert."""
        if (entry := self._packed.get(consumer.name)) is not None:
            return [*entry.slabs]
        return [self._model.get_submodule(consumer.name.rpartition(".")[0])]

    @contextmanager
    def watching(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """The model runs one batch inside."""
        if not self._is_needed:
            yield
            return
        shapes = [value.shape for value in inputs.values() if isinstance(value, Tensor) and value.dim() >= 2]
        self._tokens = {shape[0] * shape[1] for shape in shapes}
        with self._calls.watching():
            yield

    def examples(self, group: UnitGroup, x: Tensor, size: int) -> Tensor | None:
        """(rows,) the example that each row of an input belongs to; None if all examples have as many, one by one.

        Args:
            group: Whose units are read.
            x: (..., features) what they compute.
            size: The number of examples in the batch.

        Raises:
            CalibrationError: If that cannot be told.
        """
        if not self.is_in_experts(group):
            return None
        rows = x.numel() // max(1, x.shape[-1])
        if (known := self._rows.of(x)) is not None and known[0] % size == 0:
            return known[1].reshape(-1) // (known[0] // size)
        if (x.dim() > 2 and len(x) == size) or rows in self._tokens:
            return None
        raise CalibrationError(
            f"which tokens a router sends to {group.name} cannot be followed ({rows} rows, of a batch of {size}): "
            f"choose magnitude or random, calibrate one example at a time, or name it in exclude_modules"
        )


def sum_by_example(values: Tensor, examples: Tensor | None, size: int) -> Tensor:
    """(size, features): sums over the rows of each example.

    Args:
        values: (..., features).
        examples: (rows,) the example of each row; None if all have as many, one by one.
        size: How many there are.
    """
    if examples is None:  # some models flatten (batch, seq)
        return values.reshape(size, -1, values.shape[-1]).sum(1)
    flat = values.reshape(-1, values.shape[-1])
    return torch.zeros(size, flat.shape[1], dtype=flat.dtype, device=flat.device).index_add_(
        0, examples.to(flat.device), flat
    )
