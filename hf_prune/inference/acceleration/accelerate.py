"""accelerate(): give every linear layer of a model the kernel that is fastest for it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_prune.calibration.read import CalibrationData, read_calibration
from hf_prune.errors import CalibrationError, ConfigError, KernelError
from hf_prune.inference.acceleration.choose import TOKENS, Choice, choose
from hf_prune.inference.acceleration.install import decelerate, install
from hf_prune.inference.acceleration.kernels import (
    LEAST_SPARSITY,
    PRECISIONS,
    name_of,
    precision_of,
    sparsity_of,
    stepped_sparsity_of,
    zeros_of,
)
from hf_prune.inference.acceleration.layer_kinds import LayerKind
from hf_prune.inference.acceleration.layers import is_accelerated
from hf_prune.inference.acceleration.observe import bias_of, matrix_of, observe
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.inference.acceleration.saved import saved_kinds
from hf_prune.inference.acceleration.workload import WITH_THREADS, WORKLOAD, check_workload
from hf_prune.inference.speedup import workload_inputs
from hf_prune.kernels.sparse.build import kernel_problem
from hf_prune.utils.forward import eval_mode
from hf_prune.utils.number_formats import refuse_quantized
from hf_prune.utils.offloaded_weights import refuse_offloaded
from hf_prune.utils.progress import Bar
from hf_prune.utils.wrapping import check_is_model, sole_model


def accelerate(
    model: nn.Module,
    inputs: CalibrationData | None = None,
    *,
    workload: Mapping[str, int] | None = None,
    dtypes: Sequence[str] = (),
    tolerance: float | None = None,
    saved: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    progress: bool | None = None,
) -> AccelerationReport:
    """Have each linear layer of a model run on the kernel that is fastest on this machine, in place.

    For each distinct layer (shape, precision, share of zeros) and several numbers of tokens, these are timed in turns:
    torch's default, oneDNN, both without rows and columns of zeros, the sparse kernel of hf_prune in its formats and
    torch's CSR matrices, and, where ``dtypes`` allows it, lower precisions. A layer runs on another kernel than torch's
    default only where that is faster beyond the noise, and the whole model only if it is. The weights that only sparse
    kernels read are kept in their format alone, and a second format of a layer only where that is faster and takes less
    memory than the dense weight; the report says where memory grows.

    The model is then for inference: it has no gradients, and stays in its precision on the CPU. ``save_pretrained``
    saves the plain model, and :func:`decelerate` gives it back bit for bit. Do not write to its weights in between: its
    kernels hold copies of them. Products add up in float32; a sparse kernel passes over zeros also where an input is
    infinite or NaN, which a dense one turns into NaN.

    Args:
        model: Any torch module on the CPU; pruned ones gain the most.
        inputs: A typical batch: keyword arguments of the forward pass, or data as :func:`hf_prune.prune` takes it for
            calibration, whose first batch is taken; None makes one from the config.
        workload: ``batch_size`` and ``length`` of the inputs that are made; one text of 128 tokens by default.
        dtypes: Other precisions that layers may compute in: ``"bfloat16"``, ``"float16"`` and ``"int8"``. The last is
            dense, rounds inputs to 255 steps for each token and weights to 255 for each row, and needs more
            ``tolerance``.
        tolerance: The largest change of an output that is accepted, as a share of the largest output: of the model on
            the inputs, and of each layer for every number of tokens, on random inputs. A kernel that changes a layer's
            by more is left out. By default 1e-4, or twice the rounding of a layer's precision if that is more: 0.002 in
            float16, 0.016 in bfloat16, where torch's own kernels are no closer to the exact product.
        saved: The file of an earlier :meth:`AccelerationReport.save` on such a machine: its kernels are taken, and
            only the whole model is timed.
        tokenizer: The tokenizer or processor that reads ``inputs``; by default the one beside the model.
        progress: Show a progress bar.

    Returns:
        What was chosen and what it brought. "No layer gains" is an answer too; the model is then as before.

    Raises:
        ConfigError: If a dtype is unknown, or ``workload`` has something else, or stands beside ``inputs``.
        PlanError: If the model is quantized or offloaded, or inputs for it cannot be made.
        KernelError: If the model is accelerated already, not on the CPU, its outputs change by more than ``tolerance``,
            or ``saved`` is for another machine or model; the model is as before.
        CheckpointError: If ``saved`` cannot be read.
    """
    check_is_model(model)
    model = sole_model(model)
    if unknown := [name for name in dtypes if name not in PRECISIONS]:
        raise ConfigError(f"dtypes names {unknown[0]!r}: expected some of {', '.join(PRECISIONS)}")
    if is_accelerated(model):
        raise KernelError("the model is accelerated already: call decelerate() first, to choose anew")
    refuse_quantized(model)
    refuse_offloaded(model, "accelerate()")
    if devices := {p.device.type for p in model.parameters()} - {"cpu"}:
        raise KernelError(
            f"the model is on {', '.join(sorted(devices))}: expected it on the CPU, for which kernels are; move it "
            f"there (--device cpu)"
        )
    sizes = check_workload({} if workload is None else workload)
    if inputs is not None and sizes:
        raise ConfigError(f"workload is {sizes} beside inputs, which have a size of their own: leave one of them out")
    batches = read_calibration(model, inputs, tokenizer)
    if batches == []:
        raise CalibrationError(f"inputs is {inputs!r:.80}: expected at least one batch")
    typical = dict(batches[0]) if batches else workload_inputs(model, {**WORKLOAD, **sizes})
    with eval_mode(model):
        seen = observe(model, typical)
        weights = [matrix_of(layer) for layer in seen.layers.values()]
        if tolerance is None:
            tolerance = max((AccelerationReport.tolerance, *(2 * torch.finfo(weight.dtype).eps for weight in weights)))
        if saved is None:
            groups = Bar(_kinds(seen.layers), desc="Choosing kernels", unit="layer", progress=progress)
            kinds = [_chosen(group, seen.tokens, dtypes, tolerance) for group in groups]
        else:
            kinds = saved_kinds(saved, seen.layers, dtypes)
        report = dataclasses.replace(install(model, typical, seen, kinds, tolerance), dtypes=tuple(dtypes))
    if any(sparsity_of(weight) >= LEAST_SPARSITY for weight in weights) and (problem := kernel_problem()) is not None:
        report = dataclasses.replace(report, without_sparse=problem)
    kernels = [choice.kernel for kind in report.kinds for choice in kind.choices]
    if dtypes and not any(precision_of(kernel) for kernel in kernels):
        note = f"No layer computes in {' or '.join(dtypes)}: none is faster in it within tolerance={tolerance:g}."
        report = dataclasses.replace(report, notes=(*report.notes, note))
    return report


def measure_acceleration(
    model: nn.Module, workload: Mapping[str, int] | None = None, progress: bool | None = None
) -> AccelerationReport:
    """Measure what :func:`accelerate` brings a model, which has its plain layers and the same parameters afterwards.

    Args:
        model: A transformers model on the CPU.
        workload: ``batch_size`` and ``length``, as for :func:`accelerate`, and ``threads`` of PyTorch; by default all
            that it has.
        progress: Show a progress bar.

    Raises:
        HfPruneError: As :func:`accelerate` does.
    """
    workload = check_workload({} if workload is None else workload, WITH_THREADS)
    before = torch.get_num_threads()
    parameters = {module: dict(module._parameters) for module in model.modules()}
    try:
        torch.set_num_threads(workload.pop("threads", before))
        report = accelerate(model, workload=workload, progress=progress)
    finally:
        torch.set_num_threads(before)
    decelerate(model)
    for module, own in parameters.items():
        module._parameters.update(own)
    return report


def _kinds(layers: Mapping[str, nn.Module]) -> list[tuple[dict[str, nn.Module], float]]:
    """Layers that are timed as one, each group with its share of zeros, rounded to 5 %."""
    groups: dict[tuple[Any, ...], tuple[dict[str, nn.Module], float]] = {}
    for name, module in layers.items():
        weight = module._parameters["weight"]
        assert weight is not None
        sparsity = stepped_sparsity_of(weight)
        key = (
            *(type(module), tuple(weight.shape), weight.dtype, module._parameters.get("bias") is None, sparsity),
            zeros_of(matrix_of(module)),
        )
        groups.setdefault(key, ({}, sparsity))[0][name] = module
    return list(groups.values())


def _chosen(
    group: tuple[dict[str, nn.Module], float], tokens: set[int], dtypes: Sequence[str], tolerance: float
) -> LayerKind:
    """The choice for layers of one kind, timed on the first."""
    layers, sparsity = group
    first = next(iter(layers.values()))
    weight = matrix_of(first)
    choices = choose(weight, bias_of(first), sorted({*TOKENS, *tokens}), dtypes, tolerance)
    return LayerKind(
        layers=tuple(layers),
        shape=(weight.shape[0], weight.shape[1]),
        dtype=name_of(weight.dtype),
        sparsity=sparsity,
        choices=tuple(_merged(choices)),
    )


def _merged(choices: Sequence[Choice]) -> list[Choice]:
    """Choices without those that the default would make: all of them if another kernel is chosen anywhere."""
    return list(choices) if any(choice.kernel != "dense" for choice in choices) else list(choices[:1])
