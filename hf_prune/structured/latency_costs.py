"""Seconds of a forward pass as a function of the sizes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hf_prune.architectures.find_unit_groups import LayerList
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.inference.speedup import forward
from hf_prune.inference.timing import quantile, time_together
from hf_prune.structured.budget import Costs
from hf_prune.structured.costs import COARSE, FINE, measured_costs
from hf_prune.utils.forward import eval_mode

_TABLE_SECONDS = 12.0  # for a table of times, if its rounds allow it
_SLOW = 0.1  # seconds of a forward pass from which on fewer sizes are measured
_QUANTILE = 0.1  # of the times of one size: what else the machine does only ever makes it slower


def latency_costs(
    model: nn.Module,
    sites: Sequence[UnitGroup],
    lists: Sequence[LayerList],
    layers: Mapping[str, Sequence[str]],
    inputs: Mapping[str, Any],
) -> Costs:
    """Seconds of a forward pass on this machine as a function of the sizes, from interleaved runs.

    Args:
        model: The model.
        sites: Those that may lose units.
        lists: Its stacks of layers.
        layers: The sites in each layer that may go as a whole, by its name.
        inputs: Keyword arguments of a forward pass.
    """
    start = time.perf_counter()
    with eval_mode(model):
        forward(model, inputs)()
    slow = time.perf_counter() - start > _SLOW

    def measure(models: Mapping[str, nn.Module]) -> dict[str, float]:
        with eval_mode(model):
            runs = {name: forward(each, inputs) for name, each in models.items()}
            found = time_together(runs, rounds=60, warmup=1 if slow else 2, seconds=_TABLE_SECONDS)
        return {name: quantile(times.wall, _QUANTILE) for name, times in found.items()}

    return measured_costs(model, sites, lists, layers, measure, COARSE if slow else FINE)
