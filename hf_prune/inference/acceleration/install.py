"""Give layers their kernels, if the answers stay and the model gains."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from hf_prune.errors import KernelError
from hf_prune.inference.acceleration.choose import Choice, change_of, example, limits
from hf_prune.inference.acceleration.dense_kernels import Dense
from hf_prune.inference.acceleration.kernel import Kernel
from hf_prune.inference.acceleration.kernels import make_kernel
from hf_prune.inference.acceleration.layer_kinds import LayerKind
from hf_prune.inference.acceleration.layers import Accelerated, Ranges, drop_weight, switch_off, switch_on
from hf_prune.inference.acceleration.machine import this_machine
from hf_prune.inference.acceleration.observe import Seen, bias_of, difference_to, matrix_of
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.inference.speedup import forward, size_of
from hf_prune.inference.subnormals import subnormal_note
from hf_prune.inference.timing import speedup, time_together
from hf_prune.utils.formatting import format_count

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
    ranges: dict[str, Ranges] = {}
    notes = list(map(subnormal_note, seen.subnormal[:1]))
    kinds = list(kinds)
    for number, kind in enumerate(kinds):
        if kind.gains:
            of_layers, wrong = _checked({name: seen.layers[name] for name in kind.layers}, kind.choices, tolerance)
            kinds[number] = dataclasses.replace(kind, choices=tuple(wrong.get(c, c) for c in kind.choices))
            ranges |= of_layers if kinds[number].gains else {}
            if wrong:
                notes.append(_inexact_note(kind, list(wrong), tolerance))

    batch_size, length = size_of(inputs)
    report = AccelerationReport(
        kinds=tuple(kinds),
        speedup=None,
        before=0.0,
        after=0.0,
        difference=0.0,
        bytes_before=sum(_nbytes(seen.layers[name]) for name in ranges),
        bytes_after=sum(_nbytes(seen.layers[name]) for name in ranges),
        batch_size=batch_size,
        length=length,
        threads=torch.get_num_threads(),
        machine=this_machine(),
        notes=tuple(notes),
        tolerance=tolerance,
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
                f"most tolerance={tolerance:g}; allow more, or leave dtypes out"
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
        return dataclasses.replace(report, notes=(note, *notes))
    first = _first_parameters(model)
    for name in ranges:
        weight = seen.layers[name]._parameters["weight"]
        drop_weight(seen.layers[name], users[id(weight)] > 1 or id(weight) in first)
    after = sum(_nbytes(seen.layers[name]) for name in ranges)
    if (more := after - report.bytes_before) > 0:
        notes.append(
            f"The weights of these layers take {format_count(more)}B more memory than before: of some, the format of a "
            f"kernel is kept beside the dense weight."
        )
    return dataclasses.replace(
        report,
        speedup=ratio,
        before=medians["before"],
        after=medians["after"],
        difference=difference,
        bytes_after=after,
        notes=tuple(notes),
    )


def _checked(
    layers: Mapping[str, nn.Module], choices: Sequence[Choice], tolerance: float
) -> tuple[dict[str, Ranges], dict[Choice, Choice]]:
    """The kernels of layers of one kind without those that change an output of one of them by more than the tolerance.

    Returns:
        The kernels by layer, and the choices that were left out, each with torch's default in its place.
    """
    made, wrong = {}, {}
    for name, layer in layers.items():
        weight, bias = matrix_of(layer), bias_of(layer)
        made[name] = {kernel: make_kernel(kernel, weight) for kernel in dict.fromkeys(c.kernel for c in choices)}
        for choice in choices:
            if choice.kernel != "dense" and choice not in wrong:
                change = change_of(made[name][choice.kernel], weight, bias, example(weight, choice.tokens))
                if not change <= tolerance:
                    wrong[choice] = Choice(choice.tokens, "dense", choice.dense_seconds, choice.dense_seconds, 1.0)
    left = [wrong.get(choice, choice) for choice in choices]
    return {name: _ranges({"dense": Dense(), **kernels}, left) for name, kernels in made.items()}, wrong


def _inexact_note(kind: LayerKind, wrong: Sequence[Choice], tolerance: float) -> str:
    kernels = ", ".join(dict.fromkeys(choice.kernel for choice in wrong))
    counts = ", ".join(map(str, sorted(choice.tokens for choice in wrong)))
    return (
        f"Layers like {kind.layers[0]} keep torch's default for {counts} tokens: {kernels} would change an output by "
        f"more than tolerance={tolerance:g} of the largest."
    )


def _ranges(made: Mapping[str, Kernel], choices: Sequence[Choice]) -> Ranges:
    """The kernels of one layer by the number of tokens; neighbouring ranges of the same kernel are one."""
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
