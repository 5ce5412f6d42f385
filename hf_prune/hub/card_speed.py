"""The speed of a model on its card: against the dense model, and on kernels that skip zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hf_prune.hub.card_data import PruningCardData
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.utils.formatting import format_workload

_ZEROS = "Zeros alone bring no speed-up: a dense kernel multiplies by zero like by any other number."
_SMALLER = "Its matrices are smaller than those of the dense model."
_DENSE = ("dense", "onednn", "compact")  # kernels that multiply by zeros as well


def kernels_of(report: AccelerationReport) -> str:
    """What the kernels of an acceleration are, in two words."""
    sparse = any(name.partition(":")[0] not in _DENSE for name in report.kernels)
    return "sparse kernels" if sparse else "other kernels"


def allowed_text(report: AccelerationReport) -> str:
    """What was allowed beyond the defaults, as more arguments of ``accelerate()``."""
    dtypes = f", dtypes={list(report.dtypes)}" if report.dtypes else ""
    return dtypes + (f", tolerance={report.tolerance:g}" if report.tolerance != AccelerationReport.tolerance else "")


def speed_text(data: PruningCardData, plain: Callable[[str], str]) -> str:
    """What was timed, as Markdown; or that nothing was.

    Args:
        data: The facts.
        plain: Escapes a text for Markdown.
    """
    timed = _timed(data, plain)
    is_shrunk = bool(data.report.get("structure"))
    if data.acceleration is None:
        return timed or (f"Nothing was timed. {_SMALLER}" if is_shrunk else f"{_ZEROS} Nothing was timed.")
    before = timed or (_SMALLER if is_shrunk else _ZEROS)
    return f"{before}\n\n{_accelerated(AccelerationReport.from_dict(data.acceleration), plain)}"


def _timed(data: PruningCardData, plain: Callable[[str], str]) -> str:
    """The timings against the dense model; empty if there are none."""
    structure = data.report.get("structure") or {}
    if data.latency is not None:
        lines = ["| model | workload | median | speed-up |", "|---|---|---|---|"]
        for point in data.latency["points"]:
            against = point.get("against")
            faster = "" if against is None else f"{against['value']:.2f}x" + ("" if against["is_real"] else " (noise)")
            size = format_workload(point["batch_size"], point["length"])
            size += ", generating" if point.get("task") == "generate" else ""
            lines.append(
                f"| {plain(Path(point['model']).name)} | {size} | {1000 * point['median']:.1f} ms | {faster} |"
            )
        how = data.latency
        lines.append("")
        lines.append(
            plain(
                f"Timed in turns, {how['rounds']} rounds, {how['threads']} thread(s), {how['dtype']}, {how['device']}, "
                f"torch {how['torch']}."
            )
        )
        return "\n".join(lines)
    if (speed := structure.get("speed")) is not None:
        new = f" and {speed['new_tokens']} generated" if speed.get("new_tokens") else ""
        size = ("batch " if speed["length"] else "") + format_workload(speed["batch_size"], speed["length"])
        return plain(
            f"{speed['measured']:.2f} times as fast as the dense model ({size}{new}, {speed['dtype']}, "
            f"{speed['device']}, {speed['threads']} thread(s), {speed['rounds']} rounds in turns)."
        )
    return ""


def _accelerated(report: AccelerationReport, plain: Callable[[str], str]) -> str:
    """The times on torch's kernels and on those that are the fastest, and how to have them."""
    where = f"{report.machine['cpu']}, {report.threads} thread(s), torch {report.machine.get('torch', 'unknown')}"
    size = format_workload(report.batch_size, report.length)
    if (ratio := report.speedup) is None:
        without = f" Sparse kernels could not be used there: {report.without_sparse}." if report.without_sparse else ""
        return plain(f"No other kernels make this model faster on {where} ({size}).{without}")
    faster = f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
    how = (
        f"Timed in turns, end to end, with the 95 % interval: {where}. Kernels: {', '.join(report.kernels)}. The "
        f"largest change of an output is {report.difference:.1e} of the largest output. Kernels are chosen and timed "
        f"on the machine that runs them, so to have them on yours:"
    )
    workload = f'"batch_size": {report.batch_size}' + (f', "length": {report.length}' if report.length else "")
    return "\n".join(
        [
            "| this model | workload | median | speed-up |",
            "|---|---|---|---|",
            f"| on torch's own kernels | {size} | {1000 * report.before:.1f} ms | |",
            f"| on {kernels_of(report)} | {size} | {1000 * report.after:.1f} ms | {faster} |",
            "",
            plain(how),
            "",
            "```python",
            'import hf_prune  # pip install "hf_prune[kernel]"',
            "",
            f"print(hf_prune.accelerate(model, workload={{{workload}}}{allowed_text(report)}))",
            "```",
        ]
    )
