"""Repair the matrices of units that go from a checkpoint, with one block in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hf_prune.architectures.bypass import bypass, restore
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.calibration.sensitivity import Sensitivity
from hf_prune.conversion.streaming.blocks import prune_blocks
from hf_prune.conversion.streaming.gaps import close_gaps_by_blocks
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.conversion.streaming.meta_model import MetaModel
from hf_prune.conversion.streaming.output import Output
from hf_prune.conversion.streaming.repaired_values import RepairedValues
from hf_prune.conversion.streaming.runner import Batches
from hf_prune.kernels.zeroing import zero_removed_
from hf_prune.planning.plan import PlannedTensor, PruningPlan
from hf_prune.structured.close_gaps import warn_of_open_gaps
from hf_prune.structured.prune_units import unit_masks
from hf_prune.structured.reconstruction import inner_plan, repaired_weights
from hf_prune.structured.unit_plan import UnitPlan


@torch.no_grad()
def repair_units(
    meta_model: MetaModel,
    plan: UnitPlan,
    batches: Batches,
    sensitivity: Sensitivity | None,
    journal: Journal,
    cache_bytes: int,
    progress: bool | None = None,
) -> Mapping[str, Tensor]:
    """New values for the remaining weights of some matrices, the same as with the whole model in memory.

    Args:
        meta_model: The dense model.
        plan: What stays of it.
        batches: Mappings of model inputs.
        sensitivity: How much the predictions depend on the outputs of matrices, if planning measured it.
        journal: Keeps what was found, for a run that goes on.
        cache_bytes: Most bytes of block outputs that are kept in memory; the others go to the folder of the journal.
        progress: Show a progress bar.

    Returns:
        Parameters in their dense shapes, zero where units go, by name; read from the disk one at a time.

    Raises:
        CalibrationError: If the batches are unusable.
        PlanError: If the model cannot run block by block.
    """
    model, config = meta_model.model, plan.config
    if config.repair is not None and not plan.sites:
        return _closed_gaps(meta_model, plan, batches, journal, cache_bytes, progress)
    names = repaired_weights(model, config, [group for group in plan.sites if not plan.is_gone(group)])
    if not names:
        return {}
    masks = _UnitMasks(model, plan)
    removed = sum(int((~masks[name]).sum()) for name in names)
    inner = inner_plan(model, config, names, removed / sum(model.get_parameter(name).numel() for name in names))
    output = _RepairedUnits(meta_model, inner, journal, masks)
    assert plan.choice is not None
    with ExitStack() as undo:
        for layer in map(model.get_submodule, sorted(plan.choice.layers)):
            undo.callback(restore, layer)
            bypass(layer)
        prune_blocks(output, inner, batches, cache_bytes, sensitivity, fixed_masks=masks, progress=progress)
    return output.values


def _closed_gaps(
    meta_model: MetaModel, plan: UnitPlan, batches: Batches, journal: Journal, cache_bytes: int, progress: bool | None
) -> Mapping[str, Tensor]:
    values = RepairedValues(journal)
    if not values.complete:
        close_gaps_by_blocks(meta_model, plan, batches, values, journal, cache_bytes, progress)
        if not values:
            warn_of_open_gaps(meta_model.model, plan.config.repair)
        values.write({})
    return values


class _UnitMasks(Mapping[str, Tensor]):
    """What :func:`unit_masks` returns, one mask at a time."""

    def __init__(self, model: Any, plan: UnitPlan) -> None:
        self._model, self._plan = model, plan
        self._groups: dict[str, dict[str, UnitGroup]] = {}
        for group in plan.sites:
            for piece in group.slices:
                self._groups.setdefault(piece.name, {})[group.name] = group

    def __getitem__(self, name: str) -> Tensor:
        plan = dataclasses.replace(self._plan, sites=tuple(self._groups[name].values()))
        return unit_masks(self._model, plan, {name})[name]

    def __contains__(self, name: object) -> bool:
        return name in self._groups

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)


class _RepairedUnits(Output):
    """The matrices that a repair has solved again, in their dense shapes; nothing is written to the checkpoint yet.

    Args:
        meta_model: The model.
        plan: Of the matrices that are repaired.
        journal: The journal.
        masks: By parameter, what stays.
    """

    def __init__(self, meta_model: MetaModel, plan: PruningPlan, journal: Journal, masks: Mapping[str, Tensor]) -> None:
        super().__init__(meta_model, plan, {}, journal)
        self._unit_masks = masks
        self.values = RepairedValues(journal)

    def done(self, name: str) -> bool:
        """Whether the final weights of a target are on the disk."""
        return name in self.values

    def read(self, name: str) -> Tensor:
        """Read the current values of a parameter, in the dtype of a loaded model."""
        return self.values[name] if name in self.values and not self.reads_dense else super().read(name)

    def write(
        self, tensor: PlannedTensor, weight: Tensor, mask: Tensor, new: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """Keep the new values of one target, and of its bias."""
        tensors = {tensor.target.name: weight, **new}
        for name, values in tensors.items():
            tensors[name] = values.to(self.meta_model.dtypes[name]).contiguous()
            removed = mask if name == tensor.target.name else self._unit_masks.get(name)
            if removed is not None:
                zero_removed_(tensors[name], removed)
        self.values.write(tensors)
