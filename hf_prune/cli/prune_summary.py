"""What ``hf-prune prune`` says in six lines, and as JSON beside its report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.checkpoint.files import size_of_weights
from hf_prune.planning.choices import BUDGETS
from hf_prune.planning.config import PruningConfig
from hf_prune.utils.formatting import display_name, format_count, format_duration

if TYPE_CHECKING:
    from hf_prune.evaluation.sparsity_report import SparsityReport


def prune_summary(
    source: str, config: PruningConfig, out: Path, report: SparsityReport, seconds: float, data: str | None
) -> str:
    """Model, method, what is left, time, where it is, and the command to go on with.

    Args:
        source: Folder or Hub id of the dense model.
        config: The settings.
        out: The folder that was written.
        report: What was counted in it.
        seconds: How long it took.
        data: The data that was named, if any.
    """
    shrunk = report.structure
    dense = report.parameters if shrunk is None else shrunk.parameters_before
    left = report.remaining if shrunk is None else shrunk.parameters
    size = size_of_weights(out)
    stored = "" if size is None else f", {format_count(size)}B in files"
    if shrunk is None and size is not None:
        stored += " (zeros take space until they are packed)"
    if shrunk is not None and shrunk.speed is not None:
        stored += f", {shrunk.speed.measured:.2f}× as fast"
    loads = "import hf_prune, then from_pretrained" if shrunk and shrunk.needs_plugin else "plain transformers loads it"
    return "\n".join(
        [
            f"Model:   {display_name(source)} ({report.model_name}, {format_count(dense).strip()} parameters)",
            f"Method:  {method_of(config)}",
            f"Left:    {left:,} of {dense:,} parameters ({100 * left / max(dense, 1):.1f} %){stored}",
            f"Time:    {format_duration(seconds)}",
            f"Saved:   {out} ({loads})",
            f"Next:    {_next_command(source, out, data, is_shrunk=shrunk is not None)}",
        ]
    )


def run_facts(
    source: str, config: PruningConfig, out: Path, report: SparsityReport, seconds: float, data: str | None
) -> dict[str, Any]:
    """The same as plain values for JSON, besides what the report has; arguments as of :func:`prune_summary`."""
    return {
        "source": source,
        "out": str(out),
        "seconds": round(seconds, 3),
        "method": method_of(config),
        "settings": config.to_dict(),
        "bytes_in_files": size_of_weights(out),
        "needs_hf_prune": bool(report.structure and report.structure.needs_plugin),
        "next": _next_command(source, out, data, is_shrunk=report.structure is not None),
    }


def method_of(config: PruningConfig) -> str:
    """The settings that matter, in a line.

    Example:
        >>> method_of(PruningConfig(sparsity=0.8, criterion="alps", repair="least_squares"))
        'alps, unstructured, 80 %, scope layer, repair least_squares'
    """
    kinds = config.granularity if isinstance(config.granularity, str) else " and ".join(config.granularity)
    budget = next((f"{name} {value:g}" for name in BUDGETS if (value := getattr(config, name)) is not None), None)
    share = budget or (None if config.sparsity is None else f"{100 * config.sparsity:g} %")
    allocation = config.allocation if isinstance(config.allocation, str) else "explicit"
    parts = [
        config.criterion,
        kinds,
        share,
        f"scope {config.scope}",
        None if allocation == "uniform" else f"allocation {allocation}",
        None if config.objective == "layer" else f"objective {config.objective}",
        None if config.repair is None else f"repair {config.repair}",
        None if config.steps == 1 else f"{config.steps} steps",
        None if config.polish is None else "polished",
    ]
    return ", ".join(part for part in parts if part is not None)


def _next_command(source: str, out: Path, data: str | None, *, is_shrunk: bool) -> str:
    """Score it where there is data; else time what has become smaller, and pack what has zeros."""
    if data is not None:
        words = ["evaluate", str(out), "--data", data, "--against", source]
    elif is_shrunk:
        words = ["bench", source, str(out)]
    else:
        words = ["compress", str(out), f"{out}-packed"]
    return shlex.join(["hf-prune", *words])
