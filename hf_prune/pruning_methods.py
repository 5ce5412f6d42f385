"""Pruning as methods that any torch module could have; the work is done in the packages before this one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_prune.calibration.read import CalibrationData
from hf_prune.evaluation.sparsity_report import SparsityReport, sparsity_report
from hf_prune.inference.acceleration.accelerate import accelerate
from hf_prune.inference.acceleration.install import decelerate
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.plan import PruningPlan
from hf_prune.planning.signature import with_settings
from hf_prune.pruning.adopt_zeros import AdoptionReport, adopt_zeros
from hf_prune.pruning.mask_store import MaskStore, drop_masks
from hf_prune.pruning.optimizer_guard import guard_masks
from hf_prune.pruning.optimizer_hook import keep_sparse
from hf_prune.structured.shrink import shrink_modules
from hf_prune.structured.unit_plan import UnitPlan

Self = TypeVar("Self", bound="_PruningMethods")


class _PruningMethods(nn.Module):
    """What all classes with pruning have: the methods that any torch module could have."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        guard_masks(self)  # of a copy, or of what was unpickled

    @with_settings
    def plan(
        self,
        config: PruningConfig | float | None = None,
        *,
        calibration: CalibrationData | None = None,
        tokenizer: Any = None,
        target_size: int | str | None = None,
        progress: bool | None = None,
        **settings: Any,
    ) -> PruningPlan | UnitPlan:
        """What :meth:`prune` would do with these settings; nothing is changed.

        Args:
            config: The settings, or just the sparsity.
            calibration: Data, as for :func:`hf_prune.prune`, for choices that are learned from it; without it the plan
                leaves these open.
            tokenizer: The tokenizer or processor that reads it; by default the one beside the model.
            target_size: In place of a sparsity, the size of the saved file, as for :func:`hf_prune.prune`.
            progress: Show a progress bar while calibrating.
            **settings: Fields of :class:`PruningConfig` and ``preset``. Where no method is named, the preset is
                ``"balanced"`` with calibration data, and ``"fast"`` without.

        Raises:
            ConfigError: If a setting is invalid.
            PlanError: If the settings do not fit the model.
            CalibrationError: If the batches are unusable.
        """
        return prune(
            self,
            config,
            calibration=calibration,
            tokenizer=tokenizer,
            dry_run=True,
            progress=progress,
            target_size=target_size,
            **settings,
        )

    @with_settings
    def prune(
        self: Self,
        config: PruningConfig | float | None = None,
        *,
        calibration: CalibrationData | None = None,
        polish_data: CalibrationData | None = None,
        tokenizer: Any = None,
        target_size: int | str | None = None,
        keep_dense: bool = False,
        progress: bool | None = None,
        **settings: Any,
    ) -> Self:
        """Prune the model in place and return it; see :func:`hf_prune.prune`.

        Args:
            config: The settings, or just the sparsity.
            calibration: Batches, for criteria and repairs that need them.
            polish_data: Batches for a polish, if more or others than ``calibration``.
            tokenizer: The tokenizer or processor of the data, if it is not beside the model.
            target_size: In place of a sparsity: the largest size of the saved file, in bytes or as ``"30MB"``:
                compressed where weights become zeros, plain where heads, neurons or layers go.
            keep_dense: Keep a copy of the dense weights, so that ``discard_masks`` can give them back.
            progress: Show a progress bar; None shows it where somebody works interactively.
            **settings: Fields of :class:`PruningConfig` and ``preset``, in place of, or on top of, ``config``. Where no
                method is named, the preset is ``"balanced"`` with calibration data, and ``"fast"`` without.
        """
        return prune(
            self,
            config,
            calibration=calibration,
            polish_data=polish_data,
            tokenizer=tokenizer,
            keep_dense=keep_dense,
            dry_run=False,
            progress=progress,
            target_size=target_size,
            **settings,
        )

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Masks by parameter name, True = keep; empty before pruning and after :meth:`make_permanent`."""
        store = MaskStore.of(self)
        return store.view() if store is not None else MappingProxyType({})

    @property
    def pruning_config(self) -> PruningConfig | None:
        """The settings of the last pruning; None without masks, or if the masks came from elsewhere."""
        store = MaskStore.of(self)
        return store.config if store is not None else None

    def apply_masks(self: Self) -> Self:
        """Set every removed weight to zero again, after something wrote to the weights, and return the model."""
        if (store := MaskStore.of(self)) is not None:
            store.apply(self)
        return self

    def adopt_zeros(self, **settings: Any) -> AdoptionReport:
        """Turn zeros that another tool left into masks; see :func:`hf_prune.adopt_zeros`."""
        return adopt_zeros(self, **settings)

    def keep_sparse(self, optimizer: Any) -> RemovableHandle:
        """Keep removed weights at zero after each step of an optimizer; see :func:`hf_prune.keep_sparse`."""
        return keep_sparse(self, optimizer)

    def make_permanent(self: Self) -> Self:
        """Drop the masks, leave the zeros, and return the model."""
        if (store := MaskStore.of(self)) is not None:
            store.make_permanent(self)
        return self

    def discard_masks(self: Self) -> Self:
        """Drop the masks, restore the dense weights bit for bit, and return the model.

        Raises:
            MaskError: If the model was pruned without ``keep_dense=True``.
        """
        if (store := MaskStore.of(self)) is not None:
            store.discard(self)
        return self

    def drop_masks(self: Self, *names: str) -> Self:
        """Drop the masks of some weights, for example after one was replaced, and return the model.

        Raises:
            UnknownNameError: If a name has no mask.
        """
        drop_masks(self, *names)
        return self

    def shrink(self: Self) -> Self:
        """Remove every head, neuron, channel and layer pruned as a whole, and return the model; see :func:`shrink`."""
        return shrink_modules(self)

    def accelerate(self, inputs: CalibrationData | None = None, **settings: Any) -> AccelerationReport:
        """Run each linear layer on the kernel that is fastest on this machine; see :func:`hf_prune.accelerate`."""
        return accelerate(self, inputs, **settings)

    def decelerate(self: Self) -> Self:
        """Undo :meth:`accelerate` bit for bit, and return the model."""
        decelerate(self)
        return self

    def sparsity_report(self, config: PruningConfig | None = None) -> SparsityReport:
        """Count what is zero; see :func:`hf_prune.sparsity_report`."""
        return sparsity_report(self, config)


def dense_class(cls: type) -> Any:
    """The class that a pruned class is made from: the first of its bases that lacks the methods."""
    return next(c for c in cls.__mro__ if not issubclass(c, _PruningMethods))
