"""Plots of what a sweep trades: a score against sparsity, and against measured speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_prune.evaluation.sweep_point import SweepPoint
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.utils.figures import GREY, MARKERS, PALETTE, figure, lines_of, literal, spread_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Place = tuple[float, float, float]  # on the horizontal axis: a value and the ends of its interval


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

    def place(point: SweepPoint) -> Place:
        return (100 * point.sparsity,) * 3

    lines = _tradeoff_lines(dense_accuracy, (0.0,) * 3, points, place)
    best = None if sweet_spot is None else (100 * sweet_spot.sparsity, 100 * sweet_spot.evaluation.value)
    drawn, axes = _draw(lines, (0.0, 100 * dense_accuracy), best, title, subtitle, metric)
    axes.set_xlabel("sparsity of the targets (%)")
    return literal(drawn)


def plot_speed(
    dense_accuracy: float,
    dense_acceleration: AccelerationReport | None,
    points: Sequence[SweepPoint],
    sweet_spot: SweepPoint | None,
    title: str,
    subtitle: str,
    metric: str = "accuracy",
) -> Figure:
    """Plot a score against the measured speed-up, a line per criterion through rising sparsities, with both intervals.

    Args:
        dense_accuracy: Accuracy or other score of the dense model, 0 to 1.
        dense_acceleration: What kernels bring the dense model, which stands at 1 if it was not measured.
        points: The measured points; those without a speed-up are left out.
        sweet_spot: The point to mark, or None.
        title: The model.
        subtitle: Data, n, workload, machine.
        metric: What the score is.
    """

    def place(point: SweepPoint) -> Place:
        return _gain(point.acceleration)

    timed = [p for p in points if p.acceleration is not None]
    dense = _gain(dense_acceleration)
    lines = _tradeoff_lines(dense_accuracy, dense, timed, place)
    best = (place(sweet_spot)[0], 100 * sweet_spot.evaluation.value) if sweet_spot in timed else None
    drawn, axes = _draw(lines, (dense[0], 100 * dense_accuracy), best, title, subtitle, metric)
    axes.axvline(1, color=GREY, linestyle="--", linewidth=1.0, zorder=1)
    axes.set_xlabel("times as fast on the kernels that are fastest here as on torch's own")
    for i, line in enumerate(lines):
        for x, y, sparsity in list(zip(line.x, line.score, line.sparsity, strict=True))[1:]:
            beside = {"textcoords": "offset points", "fontsize": 8, "color": PALETTE[i]}
            axes.annotate(f"{sparsity:g} %", (x, y), (9, 4), **beside)
    return literal(drawn)


def _gain(acceleration: AccelerationReport | None) -> Place:
    if acceleration is None:
        return 1.0, 1.0, 1.0
    return acceleration.gain.value, acceleration.gain.low, acceleration.gain.high


def _draw(
    lines: Sequence[_Line],
    dense: tuple[float, float],
    best: tuple[float, float] | None,
    title: str,
    subtitle: str,
    metric: str,
) -> tuple[Figure, Any]:
    """The lines with their intervals and names, the dense model and the sweet spot."""
    drawn, axes = figure(8.0, 5.0)
    sign = " %" if metric == "accuracy" else ""
    axes.axhline(dense[1], color=GREY, linestyle="--", linewidth=1.0, zorder=1)
    axes.plot(*dense, marker="o", markersize=8, color=GREY, zorder=4)
    axes.annotate(f"dense {dense[1]:.2f}{sign}", dense, (6, 6), textcoords="offset points", fontsize=9, color=GREY)
    for i, line in enumerate(lines):
        axes.errorbar(
            line.x,
            line.score,
            label=line.name,
            xerr=[line.left, line.right] if any((*line.left, *line.right)) else None,
            yerr=[line.below, line.above],
            color=PALETTE[i],
            marker=MARKERS[i],
            markersize=5,
            capsize=3,
            zorder=3,
        )
    if best is not None:
        axes.plot(*best, marker="o", markersize=15, color="none", markeredgecolor=GREY, markeredgewidth=2, zorder=5)
        axes.annotate("sweet spot", best, (0, 13), textcoords="offset points", fontsize=9, ha="center")
    axes.set_ylabel("accuracy (%)" if sign else f"{metric} × 100")
    axes.set_title(f"{title}\n{subtitle}", fontsize=10)
    if not lines:
        return drawn, axes
    reach = [[x + more for x, more in zip(line.x, line.right, strict=True)] for line in lines]
    left, right = min(min(line.x) for line in lines), max(map(max, reach))
    width = (right - left) or 0.1
    low, high = axes.get_ylim()
    ends = [max(zip(xs, line.score, strict=True)) for xs, line in zip(reach, lines, strict=True)]
    heights = spread_labels([y for _, y in ends], 0.05 * (high - low))
    for i, (line, end, height) in enumerate(zip(lines, ends, heights, strict=True)):
        axes.annotate(
            line.name,
            end,
            (end[0] + 0.02 * width, height),
            textcoords="data",
            color=PALETTE[i],
            va="center",
            annotation_clip=False,
        )
    longest = max(len(line.name) for line in lines)  # room for the names at the ends
    axes.set_xlim(left - 0.04 * width, right + width * (0.03 + 0.018 * longest))
    return drawn, axes


@dataclass(frozen=True)
class _Line:
    """One line of a trade-off, sparsities and scores in per cent; its intervals reach left, right, below and above."""

    name: str
    sparsity: list[float]
    x: list[float]
    left: list[float]
    right: list[float]
    score: list[float]
    below: list[float]
    above: list[float]


def _tradeoff_lines(
    dense_value: float, dense_place: Place, points: Sequence[SweepPoint], place: Callable[[SweepPoint], Place]
) -> list[_Line]:
    """The lines of a trade-off, each from the dense model on, with their intervals."""
    pruned = [p for p in points if p.sparsity > 0]
    lines = lines_of(pruned, lambda p: p.criterion, lambda p: p.sparsity, lambda p: p.evaluation.value)
    made = []
    for name, line in lines.items():
        places = [dense_place, *map(place, line)]
        made.append(
            _Line(
                name,
                [0.0, *(100 * p.sparsity for p in line)],
                [x for x, _, _ in places],
                [x - low for x, low, _ in places],
                [high - x for x, _, high in places],
                [100 * dense_value, *(100 * p.evaluation.value for p in line)],
                [0.0, *(max(0.0, p.comparison.interval[1] - p.comparison.drop) for p in line)],
                [0.0, *(max(0.0, p.comparison.drop - p.comparison.interval[0]) for p in line)],
            )
        )
    return made
