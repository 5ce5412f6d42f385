"""Plots: histograms of weights, sparsity per layer, trade-off curves, latency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.evaluation.sparsity_report import SparsityReport
from hf_prune.evaluation.weight_statistics import WeightHistogram
from hf_prune.utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_prune.evaluation.sweep_point import SweepPoint
    from hf_prune.inference.latency_result import LatencyPoint, LatencyResult

# Okabe & Ito's palette, which colour-blind readers can tell apart; after that, line styles differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY = "#8a8a8a"


def plot_weight_histogram(before: WeightHistogram | None, after: WeightHistogram, title: str) -> Figure:
    """Plot weights before and after pruning, on a logarithmic scale, with the zeros as a bar of their own.

    Args:
        before: Histogram of the dense weights, None if they are not known.
        after: Histogram of the pruned weights, with the same edges.
        title: What is shown.
    """
    figure, axes = _figure(8.0, 4.5)
    first = after if before is None else before
    width = first.edges[1] - first.edges[0]
    total = max(1, first.counts.sum() + first.zeros)
    if before is not None:
        axes.stairs(before.counts, before.edges, fill=True, color=_GREY, alpha=0.45, label="dense")
    axes.stairs(after.counts, after.edges, color=_COLOURS[0], linewidth=1.6, label="pruned: the weights that remain")
    axes.bar(
        0,
        after.zeros,
        width=width,
        color=_COLOURS[1],
        label=f"pruned: exactly zero ({after.zeros:,}, {100 * after.zeros / total:.1f} %)",
    )
    axes.set(title=title, xlabel="weight (the outermost bins hold everything beyond)", ylabel="weights per bin")
    axes.set_xlim(first.edges[0], first.edges[-1])
    lowest = first.counts[first.counts > 0].min(initial=total)
    axes.set_ylim(bottom=max(0.5, lowest / 3), top=3 * total)  # a bin of one weight is visible
    axes.set_yscale("log")
    axes.legend(frameon=False, loc="upper left")
    return _literal(figure)


def plot_layer_sparsity(report: SparsityReport, title: str) -> Figure:
    """Plot the sparsity of every target, a bar each, in the order of the model.

    Args:
        report: The report.
        title: What is shown.
    """
    targets = report.targets
    figure, axes = _figure(8.0, max(2.5, 0.19 * len(targets) + 1.2))
    position = list(range(len(targets)))
    axes.barh(position, [100 * t.sparsity for t in targets], color=_COLOURS[0], height=0.75)
    axes.axvline(
        100 * report.target_sparsity,
        color=_COLOURS[1],
        linestyle="--",
        label=f"all targets: {100 * report.target_sparsity:.1f} %",
    )
    axes.set_yticks(position, [t.name.removesuffix(".weight") for t in targets], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, 100)
    axes.set(title=title, xlabel="sparsity (% of the weights)")
    axes.grid(axis="y", visible=False)
    figure.legend(frameon=False, loc="outside lower center")
    return _literal(figure)


def plot_tradeoff(
    dense_accuracy: float,
    points: Sequence[SweepPoint],
    sweet_spot: SweepPoint | None,
    title: str,
    subtitle: str,
    metric: str = "accuracy",
) -> Figure:
    """Plot a score against sparsity, a line per criterion, with the intervals of the paired drop and the sweet spot.

    Args:
        dense_accuracy: Accuracy or other score of the dense model, 0 to 1.
        points: The measured points.
        sweet_spot: The point to mark, or None.
        title: The model.
        subtitle: Data, n, tolerance.
        metric: What the score is.
    """
    figure, axes = _figure(8.0, 5.0)
    sign = " %" if metric == "accuracy" else ""
    dense = f"dense: {100 * dense_accuracy:.2f}{sign}"
    axes.axhline(100 * dense_accuracy, color=_GREY, linestyle="--", linewidth=1.2, label=dense)
    for i, criterion in enumerate(dict.fromkeys(p.criterion for p in points)):
        line = sorted((p for p in points if p.criterion == criterion), key=lambda p: p.sparsity)
        low = [p.comparison.drop - p.comparison.interval[0] for p in line]
        high = [p.comparison.interval[1] - p.comparison.drop for p in line]
        axes.errorbar(
            [100 * p.sparsity for p in line],
            [100 * p.evaluation.value for p in line],
            yerr=[[max(0.0, v) for v in high], [max(0.0, v) for v in low]],
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[i % len(_MARKERS)],
            linestyle=("-", "--", ":")[i // len(_COLOURS) % 3],
            capsize=3,
            label=criterion,
        )
    if sweet_spot is not None:
        x, y = 100 * sweet_spot.sparsity, 100 * sweet_spot.evaluation.value
        axes.plot(
            x,
            y,
            marker="*",
            markersize=20,
            color="#F0E442",
            markeredgecolor="black",
            linestyle="none",
            label=f"sweet spot: {x:g} % ({sweet_spot.criterion})",
            zorder=5,
        )
    axes.set(xlabel="sparsity of the targets (%)", ylabel="accuracy (%)" if sign else f"{metric} × 100")
    axes.set_title(f"{title}\n{subtitle}", fontsize=10)
    axes.legend(frameon=False, loc="best")
    return _literal(figure)


def plot_latency(result: LatencyResult, accuracies: Mapping[str, float], title: str) -> Figure:
    """Plot accuracy against measured speed-up, a panel per workload; without accuracies, the latencies themselves.

    A mark is hollow if the model cannot be told apart from the first one.

    Args:
        result: Models timed in turns; the first one is what the others are compared with.
        accuracies: Accuracy of each model by name, 0 to 1; empty if they were not scored.
        title: What was compared.
    """
    workloads = list(dict.fromkeys(p.workload for p in result.points))
    models = list(dict.fromkeys(p.model for p in result.points))
    columns = 2 if len(workloads) == 4 else min(3, len(workloads))
    rows = -(-len(workloads) // columns)
    height = 3.6 if accuracies else 0.7 + 0.45 * len(models)
    figure, panels = _panels(max(8.0, 4.0 * columns), 1.0 + height * rows, rows, columns)
    for axes, workload in zip(panels, workloads, strict=False):
        for point in (p for p in result.points if p.workload == workload):
            number = models.index(point.model)
            if accuracies:
                _draw_speedup(axes, point, number, 100 * accuracies[point.model])
            else:
                _draw_latency(axes, point, number)
        axes.set_title(workload, fontsize=10)
        if accuracies:
            axes.axvline(1, color=_GREY, linestyle="--", linewidth=1.2, zorder=1)
            axes.margins(0.12)
            axes.set_xlabel(f"times as fast as {models[0]}")
        else:
            axes.set_yticks(range(len(models)), models)
            axes.margins(x=0.12)
            axes.set(xlabel="milliseconds", ylim=(len(models) - 0.4, -0.7))
            axes.set_xlim(left=0)
    for axes in panels[len(workloads) :]:
        axes.set_visible(False)
    if accuracies:
        for axes in panels[::columns]:
            axes.set_ylabel("accuracy (%)")
        figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    hollow = "" if all(p.against is None or p.against.is_real for p in result.points) else "; hollow: within the noise"
    what = f"medians and {'95 % intervals' if accuracies else 'quartiles'}{hollow}"
    setting = f"{result.rounds} rounds in turns, {result.dtype}, {result.device}, {result.threads} thread(s)"
    figure.suptitle(f"{title}\n{setting}\n{what}", fontsize=10)
    return _literal(figure)


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
    colour = _COLOURS[number % len(_COLOURS)]
    told = point.against is None or point.against.is_real
    return {
        "color": colour,
        "marker": _MARKERS[(number + number // len(_COLOURS)) % len(_MARKERS)],  # a pair of its own for each of 36
        "markerfacecolor": colour if told else "white",
        "linestyle": "none",
        "capsize": 3,
    }


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure to a file atomically; its suffix gives the format.

    Args:
        figure: What to write.
        path: Where to, such as ``tradeoff.png``.
    """
    kind = path.suffix.removeprefix(".")
    mark = {"Software": "hf_prune"} if kind == "png" else None  # is_drawn looks for it
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format=kind, metadata=mark)
    return path


def is_drawn(path: Path) -> bool:
    """Whether a file is a PNG that :func:`save_figure` wrote."""
    return path.is_file() and b"Software\0hf_prune" in path.read_bytes()[:4096]


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


def _literal(figure: Figure) -> Figure:
    """Turn off formulas in a figure's texts, so that a dollar sign in a name is just that.

    The numbers of logarithmic axes are formulas; they are made when the figure is drawn, and stay.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if "$" in text.get_text() and r"\mathdefault" not in text.get_text():
            text.set_parse_math(False)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    """A figure with one panel, without pyplot's global state, so that plots work in threads and servers."""
    figure, (axes,) = _panels(width, height, 1, 1)
    return figure, axes


def _panels(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Any]]:
    """A figure with several panels, row by row, that share their vertical axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, panels
