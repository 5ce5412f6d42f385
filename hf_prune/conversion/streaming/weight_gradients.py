"""Gradients of weights, on the disk until their weight is pruned."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import Tensor

from hf_prune.calibration.statistics import fill_unreached, warn_of_unreached
from hf_prune.criteria.base import GRADIENTS, LABELLED, WeightStats, derived_seed
from hf_prune.kernels.matrix import Target
from hf_prune.planning.plan import PruningPlan, targets_of
from hf_prune.utils.offload_cache import OffloadCache


class WeightGradients:
    """What a criterion needs to know of the gradients of every weight of the dense model.

    Args:
        plan: The plan.
        folder: Where they are kept.

    Attributes:
        needs: Which ones the criterion needs.
    """

    def __init__(self, plan: PruningPlan, folder: str | os.PathLike[str]) -> None:
        self.needs = plan.needs & GRADIENTS
        self._plan = plan
        self._values = OffloadCache(0, folder)

    def fill(self, measured: Iterable[tuple[Target, dict[str, Tensor]]]) -> None:
        """Store gradients as they are measured."""
        without: dict[str, list[str]] = {}
        for target, gradients in measured:
            labelled = LABELLED & gradients.keys()
            if labelled and self._plan.config.scope != "global":
                without[target.name] = fill_unreached(target, gradients, labelled)
            for need, value in gradients.items():
                self._values.put((target.name, need), value)
        warn_of_unreached(name for t in targets_of(self._plan) for name in without.get(t.name, ()))

    def stats(self, name: str) -> WeightStats:
        """The statistics of a weight."""
        values = {need: self._values.get((name, need)) for need in self.needs}
        return WeightStats(seed=derived_seed(self._plan.config.seed, name), **values)

    def close(self) -> None:
        """Forget them."""
        self._values.close()
