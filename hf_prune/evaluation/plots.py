"""Plots: histograms of weights, sparsity per layer, latency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.evaluation.sparsity_report import SparsityReport
from hf_prune.evaluation.weight_statistics import WeightHistogram
from hf_prune.utils.figures import (
    GREY,
    MARKERS,
    PALETTE,
    figure,
    literal,
    panels,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_prune.inference.latency_result import LatencyPoint, LatencyResult


def plot_weight_histogram(before: WeightHistogram | None, after: WeightHistogram, title: str) -> Figure:
    """Plot weights before and after pruning, on a logarithmic scale, with the zeros as a bar of their own.

    Args:
        before: Histogram of the dense weights, None if they are not known.
        after: Histogram of the pruned weights, with the same edges.
        title: What is shown.
    """
    drawn, axes = figure(8.0, 4.5)
    first = after if before is None else before
    width = first.edges[1] - first.edges[0]
    total = max(1, first.counts.sum() + first.zeros)
    if before is not None:
        axes.stairs(before.counts, before.edges, fill=True, color=GREY, alpha=0.45, label="dense")
    axes.stairs(after.counts, after.edges, color=PALETTE[0], linewidth=1.6, label="pruned: the weights that remain")
    axes.bar(
        0,
        after.zeros,
        width=width,
        color=PALETTE[1],
        label=f"pruned: exactly zero ({after.zeros:,}, {100 * after.zeros / total:.1f} %)",
    )
    axes.set(title=title, xlabel="weight (the outermost bins hold everything beyond)", ylabel="weights per bin")
    axes.set_xlim(first.edges[0], first.edges[-1])
    lowest = first.counts[first.counts > 0].min(initial=total)
    axes.set_ylim(bottom=max(0.5, lowest / 3), top=3 * total)  # a bin of one weight is visible
    axes.set_yscale("log")
    axes.legend(frameon=False, loc="upper left")
    return literal(drawn)


def plot_layer_sparsity(report: SparsityReport, title: str) -> Figure:
    """Plot the sparsity of every target, a bar each, in the order of the model.

    Args:
        report: The report.
        title: What is shown.
    """
    targets = report.targets
    drawn, axes = figure(8.0, max(2.5, 0.19 * len(targets) + 1.2))
    position = list(range(len(targets)))
    axes.barh(position, [100 * t.sparsity for t in targets], color=PALETTE[0], height=0.75)
    axes.axvline(
        100 * report.target_sparsity,
        color=PALETTE[1],
        linestyle="--",
        label=f"all targets: {100 * report.target_sparsity:.1f} %",
    )
    axes.set_yticks(position, [t.name.removesuffix(".weight") for t in targets], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, 100)
    axes.set(title=title, xlabel="sparsity (% of the weights)")
    axes.grid(axis="y", visible=False)
    drawn.legend(frameon=False, loc="outside lower center")
    return literal(drawn)


def plot_latency(
    result: LatencyResult, accuracies: Mapping[str, float], title: str, *, measure: str = "accuracy (%)"
) -> Figure:
    """Plot accuracy against measured speed-up, a panel per workload; without accuracies, the latencies themselves.

    A mark is hollow if the model cannot be told apart from the first one.

    Args:
        result: Models timed in turns; the first one is what the others are compared with.
        accuracies: Accuracy of each model by name, 0 to 1, or another score; empty if they were not scored.
        title: What was compared.
        measure: What the scores are; accuracies are drawn in per cent.
    """
    scale = 100 if measure == "accuracy (%)" else 1
    workloads = list(dict.fromkeys(p.workload for p in result.points))
    models = list(dict.fromkeys(p.model for p in result.points))
    columns = 2 if len(workloads) == 4 else min(3, len(workloads))
    rows = -(-len(workloads) // columns)
    height = 3.6 if accuracies else 0.7 + 0.45 * len(models)
    drawn, panes = panels(max(8.0, 4.0 * columns), 1.0 + height * rows, rows, columns)
    for axes, workload in zip(panes, workloads, strict=False):
        for point in (p for p in result.points if p.workload == workload):
            number = models.index(point.model)
            if accuracies:
                _draw_speedup(axes, point, number, scale * accuracies[point.model])
            else:
                _draw_latency(axes, point, number)
        axes.set_title(workload, fontsize=10)
        if accuracies:
            axes.axvline(1, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
            axes.margins(0.12)
            axes.set_xlabel(f"times as fast as {models[0]}")
        else:
            axes.set_yticks(range(len(models)), models)
            axes.margins(x=0.12)
            axes.set(xlabel="milliseconds", ylim=(len(models) - 0.4, -0.7))
            axes.set_xlim(left=0)
    for axes in panes[len(workloads) :]:
        axes.set_visible(False)
    if accuracies:
        for axes in panes[::columns]:
            axes.set_ylabel(measure)
        drawn.legend(*panes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    hollow = "" if all(p.against is None or p.against.is_real for p in result.points) else "; hollow: within the noise"
    what = f"medians and {'95 % intervals' if accuracies else 'quartiles'}{hollow}"
    setting = f"{result.rounds} rounds in turns, {result.dtype}, {result.device}, {result.threads} thread(s)"
    drawn.suptitle(f"{title}\n{setting}\n{what}", fontsize=10)
    return literal(drawn)


def _draw_speedup(axes: Any, point: LatencyPoint, number: int, accuracy: float) -> None:
    ratio = point.against
    value, low, high = (1.0, 1.0, 1.0) if ratio is None else (ratio.value, ratio.low, ratio.high)
    spread = None if math.isinf(high) else [[value - low], [high - value]]  # too few rounds for an interval
    axes.errorbar(value, accuracy, xerr=spread, label=point.model, **_mark(point, number))


def _draw_latency(axes: Any, point: LatencyPoint, number: int) -> None:
    value, low, high = 1e3 * point.median, 1e3 * point.low, 1e3 * point.high
    axes.errorbar(value, number, xerr=[[value - low], [high - value]], **_mark(point, number))
    axes.annotate(f"{value:,.3g}", (value, number), (0, 7), textcoords="offset points", fontsize=8, ha="center")


def _mark(point: LatencyPoint, number: int) -> dict[str, Any]:
    colour = PALETTE[number % len(PALETTE)]
    told = point.against is None or point.against.is_real
    return {
        "color": colour,
        "marker": MARKERS[(number + number // len(PALETTE)) % len(MARKERS)],  # a pair of its own for each of 36
        "markerfacecolor": colour if told else "white",
        "linestyle": "none",
        "capsize": 3,
    }


PLOTS = ("layers.png", "weights.png")


def write_plots(
    folder: Path, report: SparsityReport, before: WeightHistogram | None, after: WeightHistogram, name: str
) -> None:
    """Write ``layers.png`` and ``weights.png``.

    Args:
        folder: Where to.
        report: Sparsity per layer.
        before: Histogram of the dense weights, None if they are not known.
        after: Histogram of the pruned weights, with the same edges.
        name: What to call the model.
    """
    save_figure(plot_layer_sparsity(report, f"Sparsity per layer: {name}"), folder / "layers.png")
    save_figure(plot_weight_histogram(before, after, f"Weights of the targets: {name}"), folder / "weights.png")
