"""The picture of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_prune.search.goals import Goal
from hf_prune.search.point import SearchPoint
from hf_prune.utils.figures import GREY, MARKERS, PALETTE, figure, literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MEASURES = {"speedup": "times as fast, measured", "size": "MB of the compressed file", "sparsity": "share of zeros"}


def plot_search(
    points: Sequence[SearchPoint], best: SearchPoint | None, goal: Goal, max_drop: float, unit: str, title: str
) -> Figure:
    """Plot what each candidate lost against what the goal asks for, with the accepted loss and the winner.

    Args:
        points: All candidates.
        best: The winner, None if there is none.
        goal: What the search was for.
        max_drop: The largest accepted loss.
        unit: What a loss is in.
        title: What is shown.
    """
    scale = 1e-6 if goal.measured == "size" else 1.0
    drawn, axes = figure(8.0, 5.0)
    axes.axhline(max_drop, color=GREY, linestyle="--", linewidth=1.2)
    axes.annotate(f"accepted: {max_drop:g}", (0.01, max_drop), xycoords=("axes fraction", "data"), va="bottom")
    for number, preset in enumerate(dict.fromkeys(point.preset for point in points)):
        line = sorted((p for p in points if p.preset == preset), key=lambda p: getattr(p, goal.measured))
        x, lost = [scale * getattr(p, goal.measured) for p in line], [p.loss.value for p in line]
        above = [max(0.0, p.loss.bound - p.loss.value) for p in line]
        axes.errorbar(x, lost, [[0.0] * len(line), above], marker=MARKERS[number], color=PALETTE[number], capsize=3)
        axes.annotate(preset, (x[-1], lost[-1]), xytext=(6, 0), textcoords="offset points", va="center")
    if best is not None:
        place = scale * getattr(best, goal.measured), best.loss.value
        axes.plot(*place, marker="*", markersize=18, color=PALETTE[4], markeredgecolor="black", zorder=5)
        axes.annotate("chosen", place, xytext=(0, -20), textcoords="offset points", ha="center")
    axes.set(xlabel=_MEASURES[goal.measured], ylabel=f"lost, {unit}")
    axes.set_title(title, fontsize=10)
    return literal(drawn)
