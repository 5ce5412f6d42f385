"""The time of a workload as a function of the sizes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hf_prune.architectures.layer_list import LayerList
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.inference.passes import timed, workload_passes
from hf_prune.inference.timing import quantile, time_together
from hf_prune.structured.budget import Costs
from hf_prune.structured.costs import measured_costs
from hf_prune.utils.forward import eval_mode

_TABLE_SECONDS = 12.0  # for measuring all sizes; fewer if the rounds are done before
_SLOW = 0.1  # seconds of a forward pass above which fewer sizes are measured
_QUANTILE = 0.1  # of the times of one size: whatever else the machine does can only add to them


def latency_costs(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    lists: Sequence[LayerList],
    layers: Mapping[str, Sequence[str]],
    inputs: Mapping[str, Any],
    workload: Mapping[str, int],
) -> Costs:
    """Seconds of a workload on this machine as a function of the sizes, measured in turns.

    Of a generation, prefill and decoding are timed apart, and added up.

    Args:
        model: The model.
        groups: The groups that may lose units.
        lists: The stacks of layers of the model.
        layers: The layers that may be removed as a whole, each with the names of the groups in it.
        inputs: Keyword arguments of a forward pass, or the prompt.
        workload: What is run, see :func:`~hf_prune.inference.passes.workload_passes`.

    Raises:
        PlanError: If the workload is a generation, and the model cannot generate.
    """
    with eval_mode(model):
        first = next(iter(workload_passes(model, inputs, workload).values()))
        start = time.perf_counter()
        timed(model, first.run)()
        slow = time.perf_counter() - start > _SLOW

    def measure(models: Mapping[str, nn.Module]) -> dict[str, float]:
        with eval_mode(model):
            passes = {name: workload_passes(sized, inputs, workload) for name, sized in models.items()}
            runs = {
                f"{name}, {part}": timed(models[name], one.run)
                for name, parts in passes.items()
                for part, one in parts.items()
            }
            timings = time_together(runs, rounds=60, warmup=1 if slow else 2, seconds=_TABLE_SECONDS)
        seconds = {key: quantile(times.wall, _QUANTILE) for key, times in timings.items()}
        return {
            name: sum(one.times * seconds[f"{name}, {part}"] for part, one in parts.items())
            for name, parts in passes.items()
        }

    return measured_costs(model, groups, lists, layers, measure, "coarse" if slow else "fine")
