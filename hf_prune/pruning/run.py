"""CalibrationRun: all that the ways of pruning read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from hf_prune.calibration.replay import Trials
from hf_prune.calibration.sensitivity import Sensitivity
from hf_prune.planning.config import PruningConfig
from hf_prune.pruning.transaction import Transaction

Plan = TypeVar("Plan", covariant=True)


@dataclass(frozen=True)
class MemoryBudget:
    """How many bytes of recorded tensors stay in memory; the rest goes to a temporary folder.

    Args:
        polish: For the dense outputs that a polish aims at.
        single: For a cache that is filled by itself.
        shared: For each of up to four caches that are filled together: outputs of blocks of the pruned model and of the
            dense one, outputs that targets aim at, and sensitivities.
    """

    polish: int
    single: int
    shared: int

    @classmethod
    def split(cls, cache_bytes: int, config: PruningConfig) -> MemoryBudget:
        """Split a budget among all that the settings record: half of it for a polish, if there is one."""
        polish = cache_bytes // 2 if config.polish is not None else 0
        single = cache_bytes - polish
        return cls(polish, single, single // 4)


@dataclass(frozen=True)
class CalibrationRun(Generic[Plan]):
    """A model, the plan for it, and the data that it is pruned with. Only the model's weights and ``trials`` change.

    Args:
        model: The model.
        plan: What is removed.
        memory: How much is kept in memory.
        batches: Calibration batches, the same in every process; None if nothing learns from them.
        previous_masks: Masks of earlier prunings, by parameter name.
        progress: Whether to show progress bars.
        sensitivity: How much the predictions depend on the outputs of targets, if planning measured it.
        fixed_masks: Masks that are known already, by parameter name, so that only a repair is left to do.
        trials: Which blocks may be replayed, as far as it was tried.
    """

    model: nn.Module
    plan: Plan
    memory: MemoryBudget
    batches: list[Mapping[str, Any]] | None = None
    previous_masks: Mapping[str, Tensor] = field(default_factory=dict)
    progress: bool | None = None
    sensitivity: Sensitivity | None = None
    fixed_masks: Mapping[str, Tensor] | None = None
    trials: Trials = field(default_factory=dict)

    @property
    def data(self) -> list[Mapping[str, Any]]:
        """The batches, where settings that learn from them have made sure that there are some."""
        assert self.batches is not None
        return self.batches


Result = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""Bool masks (True = keep) and new values of weights, by parameter name."""

Strategy = Callable[[CalibrationRun[Any], Transaction], Result]
"""A way of pruning: it may write through the transaction on its way, and returns what is left to write."""
