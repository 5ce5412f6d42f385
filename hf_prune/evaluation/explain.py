"""Explain whether a checkpoint is faster than the dense one: what its shapes and zeros mean, and what was measured."""

from __future__ import annotations

from torch import nn

from hf_prune.architectures.kinds.registry import unit_descriptions
from hf_prune.errors import ArchitectureError
from hf_prune.evaluation.sparsity_report import SparsityReport, sparsity_report
from hf_prune.evaluation.structure_report import StructureReport, structure_report
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.inference.latency_result import LatencyResult

SOME_ZEROS = 0.01  # share of zeros from which they are mentioned
MANY_ZEROS = 0.5  # and from which sparse kernels may be faster


def explain_speed(
    model: nn.Module, measured: LatencyResult | None = None, acceleration: AccelerationReport | None = None
) -> str:
    """Explain whether a model is faster than the dense one it came from, where, and why or why not.

    Args:
        model: A transformers model.
        measured: The timing of both in turns, if there is one.
        acceleration: What :func:`hf_prune.accelerate` found for the model, if it was asked.
    """
    lines = [f"{type(model).__name__}:", *speed_reasons(model)]
    if acceleration is not None:
        lines.append(acceleration.sentence)
    if measured is None and acceleration is None:
        lines.append("Nothing was timed: name the dense model to compare with.")
    elif measured is not None:
        lines += ["Measured:", str(measured)]
    return "\n".join(lines)


def speed_reasons(model: nn.Module) -> list[str]:
    """What the shapes and the zeros of a model mean for its speed, in lines."""
    zeros = sparsity_report(model)
    try:
        shapes = _shapes(structure_report(model))
    except ArchitectureError as error:
        unknown = f"where the heads and neurons of a {zeros.model_name} are is not known"
        shapes = [f"Shapes: {unknown}, so they are not counted: {error}."]
    return [*shapes, *_zeros(zeros)]


def _shapes(structure: StructureReport) -> list[str]:
    if structure.parameters == structure.parameters_before:
        return [
            "Shapes: those of the dense model. Nothing was taken out, so a dense kernel does all of the work it did."
        ]
    lines = [
        f"Shapes: {structure.parameters:,} of {structure.parameters_before:,} parameters are left, in smaller "
        f"matrices: that is less work on every machine, with any kernel."
    ]
    for kind in unit_descriptions():
        now = sum(s.units for s in structure.sites if s.kind == kind)
        before = sum(s.before for s in structure.sites if s.kind == kind)
        if now < before:
            least = min((s for s in structure.sites if s.kind == kind), key=lambda s: s.units / max(s.before, 1))
            lines.append(
                f"  {now:,} of {before:,} {kind}s are left in the layers that are left; fewest at {least.name} "
                f"({least.units:,} of {least.before:,})."
            )
    for name, (now, before) in structure.layers.items():
        if now < before:
            lines.append(f"  {now} of {before} layers are left in {name}.")
    if structure.speed is not None:
        lines.append(f"  When it was pruned: {structure.speed}")
    return lines


def _zeros(zeros: SparsityReport) -> list[str]:
    share = zeros.target_sparsity
    if share < SOME_ZEROS:
        return ["Zeros: hardly any in the matrices that are left."]
    lines = [
        f"Zeros: {100 * share:.1f} % of {zeros.target_parameters:,} weights in Linears. A dense kernel multiplies by "
        f"them like by any other number: they bring no speed, and no smaller file unless it is compressed."
    ]
    if "2:4" in zeros.nm_patterns:
        lines.append(
            "  They are 2:4, which sparse tensor cores of NVIDIA GPUs (Ampere and later) can skip, after "
            "torch.sparse.to_sparse_semi_structured, in half precision."
        )
    if share >= MANY_ZEROS:
        lines.append(
            "  So many can pay off with sparse kernels on a CPU: hf-prune accelerate measures it, layer by layer."
        )
    lines.append(
        "  To be faster with what everybody has, remove whole units: "
        "granularity=('head', 'neuron'), target_speedup=2, then shrink()."
    )
    return lines
