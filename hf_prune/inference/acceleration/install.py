"""Give layers their kernels, if the answers stay and the model gains."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_prune.errors import KernelError
from hf_prune.inference.acceleration.choose import Choice, limits
from hf_prune.inference.acceleration.kernels import make_kernel
from hf_prune.inference.acceleration.layers import Accelerated, Ranges, drop_weight, switch_off, switch_on
from hf_prune.inference.acceleration.observe import Seen, difference_to, matrix_of
from hf_prune.inference.acceleration.report import AccelerationReport, LayerKind, this_machine
from hf_prune.inference.speedup import forward
from hf_prune.inference.timing import speedup, time_together

_SECONDS = 5.0  # for timing the whole model


def decelerate(model: nn.Module) -> nn.Module:
    """Give an accelerated model its plain layers and its weights back, bit for bit, in place.

    Returns:
        The same model.
    """
    for module in list(model.modules()):
        if isinstance(module, Accelerated):
            switch_off(module)
    return model


def install(
    model: nn.Module, inputs: Mapping[str, Any], seen: Seen, kinds: Sequence[LayerKind], tolerance: float
) -> AccelerationReport:
    """Give layers their kernels if the outputs stay and the model gains, and report."""
    ranges = {
        name: _ranges(matrix_of(seen.layers[name]), kind.choices)
        for kind in kinds
        if any(choice.kernel != "dense" for choice in kind.choices)
        for name in kind.layers
    }

    report = AccelerationReport(
        kinds=tuple(kinds),
        speedup=None,
        before=0.0,
        after=0.0,
        difference=0.0,
        bytes_before=sum(_nbytes(seen.layers[name]) for name in ranges),
        bytes_after=sum(_nbytes(seen.layers[name]) for name in ranges),
        threads=torch.get_num_threads(),
        machine=this_machine(),
        notes=_notes(seen),
    )
    if not ranges:
        return report
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    try:
        for name, of_layer in ranges.items():
            switch_on(seen.layers[name], of_layer)
        difference = difference_to(seen.outputs, model, inputs)
        if not difference <= tolerance:
            raise KernelError(
                f"the outputs of the accelerated model differ by {difference:.1e} of the largest output: expected at "
                f"most tolerance={tolerance:g}; allow more, or fewer dtypes"
            )
        timings = _time(model, inputs, [seen.layers[name] for name in ranges])
    except BaseException:
        decelerate(model)
        raise
    ratio = speedup(timings["before"], timings["after"])
    medians = {name: statistics.median(times) for name, times in timings.items()}
    if ratio.low <= 1:
        decelerate(model)
        note = (
            f"Layers gain alone, and the model does not: {ratio.value:.2f} times as fast (95 % interval "
            f"{ratio.low:.2f} to {ratio.high:.2f})."
        )
        return dataclasses.replace(report, notes=(note, *report.notes))
    first = _first_parameters(model)
    for name in ranges:
        weight = seen.layers[name]._parameters["weight"]
        drop_weight(seen.layers[name], users[id(weight)] > 1 or id(weight) in first)
    return dataclasses.replace(
        report,
        speedup=ratio,
        before=medians["before"],
        after=medians["after"],
        difference=difference,
        bytes_after=sum(_nbytes(seen.layers[name]) for name in ranges),
    )


def _ranges(weight: Tensor, choices: Sequence[Choice]) -> Ranges:
    """The kernels of one layer, each made once; neighbouring ranges of the same kernel are one."""
    made = {name: make_kernel(name, weight) for name in dict.fromkeys(choice.kernel for choice in choices)}
    ends = limits([choice.tokens for choice in choices])
    names = [choice.kernel for choice in choices]
    last = [i for i, name in enumerate(names) if i + 1 == len(names) or names[i + 1] != name]
    return Ranges(tuple(ends[i] for i in last[:-1]), tuple(made[names[i]] for i in last))


def _time(model: nn.Module, inputs: Mapping[str, Any], layers: Sequence[nn.Module]) -> dict[str, tuple[float, ...]]:
    """Seconds of the model before and after, in turns; its layers are accelerated before and afterwards."""
    run = forward(model, inputs)
    classes = {
        "before": [(layer, cast(Accelerated, layer).dense_class) for layer in layers],
        "after": [(layer, type(layer)) for layer in layers],
    }

    def run_with(name: str) -> None:
        for layer, layer_class in classes[name]:  # takes microseconds, and both do it
            layer.__class__ = layer_class
        run()

    runs = {name: partial(run_with, name) for name in classes}
    try:
        timings = time_together(runs, rounds=100, warmup=2, seconds=_SECONDS)
    finally:
        for layer, layer_class in classes["after"]:
            layer.__class__ = layer_class
    return {name: times.wall for name, times in timings.items()}


def _first_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that tell where a model is: ``model.device`` asks the first one of each."""
    from transformers import PreTrainedModel

    models = [model, *(module for module in model.modules() if isinstance(module, PreTrainedModel))]
    return {id(parameter) for one in models for parameter in itertools.islice(one.parameters(), 1)}


def _nbytes(module: nn.Module) -> int:
    """Bytes of a layer's weight, dense or in the formats of its kernels."""
    weight = module._parameters["weight"]
    assert weight is not None
    dense = 0 if weight.is_meta else weight.numel() * weight.element_size()
    return dense + (module.ranges.nbytes if isinstance(module, Accelerated) else 0)


def _notes(seen: Seen) -> tuple[str, ...]:
    if not seen.subnormal:
        return ()
    return (
        f"Inputs of {seen.subnormal[0]} hold subnormal numbers, on which processors are many times slower: "
        f"torch.set_flush_denormal(True) turns them into zeros.",
    )
