"""How pictures look: one palette that colour-blind readers can tell apart, no background, legible on any page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_prune.utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = TypeVar("Point")

#: Okabe & Ito's palette, without its yellow, which is too light on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#8a8a8a"
BOTH, LIGHT, DARK = "#767676", "#1a1a1a", "#e6e6e6"  # texts and axes: legible on any page, on light, on dark ones


def bar_chart(labels: Sequence[str], values: Sequence[float], measure: str, title: str) -> Figure:
    """A horizontal bar for each value, with the value at its end.

    Args:
        labels: What each bar is.
        values: How long it is.
        measure: What the values are.
        title: What is shown.
    """
    drawn, axes = figure(8.0, max(1.8, 0.28 * len(values) + 1.1))
    bars = axes.barh(range(len(values)), values, color=PALETTE[0], height=0.7)
    axes.bar_label(bars, [f"{value:,.4g}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(values)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title=title, xlabel=measure)
    axes.grid(axis="y", visible=False)
    return literal(drawn)


def figure(width: float, height: float) -> tuple[Figure, Any]:
    """A figure with one panel, without pyplot's global state, so that plots work in threads and servers."""
    drawn, (axes,) = panels(width, height, 1, 1)
    return drawn, axes


def panels(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Any]]:
    """A figure with several panels, row by row, that share their vertical axis; its background is transparent."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    drawn.patch.set_alpha(0)
    panes = list(drawn.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes in panes:
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return drawn, panes


def literal(drawn: Figure) -> Figure:
    """Turn off formulas in a figure's texts, so that a dollar sign in a name is just that.

    The numbers of logarithmic axes are formulas; they are made when the figure is drawn, and stay.
    """
    from matplotlib.text import Text

    for text in drawn.findobj(Text):
        if "$" in text.get_text() and r"\mathdefault" not in text.get_text():
            text.set_parse_math(False)
    return drawn


def lines_of(
    points: Iterable[Point], name: Callable[[Point], str], x: Callable[[Point], float], y: Callable[[Point], float]
) -> dict[str, list[Point]]:
    """The lines that a plot shows, whoever draws it: points by name, sorted; at most six, those with the highest mean.

    Args:
        points: All points.
        name: The line that a point is on.
        x: Its place on the line.
        y: Its height.
    """
    lines: dict[str, list[Point]] = {}
    for point in points:
        lines.setdefault(name(point), []).append(point)
    best = sorted(lines, key=lambda each: -sum(map(y, lines[each])) / len(lines[each]))[: len(PALETTE)]
    return {each: sorted(line, key=x) for each, line in lines.items() if each in best}


def spread_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Heights of labels near the given ones, at least a gap from each other, in the same order.

    Args:
        heights: Where the ends of the lines are.
        gap: The least distance.

    Example:
        >>> spread_labels([1.0, 1.0, 5.0], 1.0)
        [0.5, 1.5, 5.0]
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[list[int]] = []
    centres: list[float] = []
    for i in order:
        groups.append([i])
        centres.append(heights[i])
        while len(groups) > 1 and centres[-1] - centres[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2:
            members = groups.pop(-2) + groups.pop()
            del centres[-2:]
            groups.append(members)
            centres.append(sum(heights[j] for j in members) / len(members))
    placed = list(heights)
    for members, centre in zip(groups, centres, strict=True):
        for place, i in enumerate(members):
            placed[i] = centre + gap * (place - (len(members) - 1) / 2)
    return placed


def save_figure(drawn: Figure, path: Path, *, ink: str = BOTH) -> Path:
    """Write a figure to a file atomically; its suffix gives the format.

    Args:
        drawn: What to write.
        path: Where to, such as ``tradeoff.png``.
        ink: Colour of texts and axes.
    """
    kind = path.suffix.removeprefix(".")
    mark = {"Software": "hf_prune"} if kind == "png" else None  # is_drawn looks for it
    _set_ink(drawn, ink)
    with atomic_path(path) as temporary:
        drawn.savefig(temporary, dpi=150, format=kind, metadata=mark)
    return path


def save_pair(drawn: Figure, path: Path) -> list[Path]:
    """Write a figure for light pages and, as ``name-dark.png``, for dark ones.

    Args:
        drawn: What to write.
        path: The file for light pages.
    """
    return [save_figure(drawn, path, ink=LIGHT), save_figure(drawn, dark_name(path), ink=DARK)]


def dark_name(path: Path) -> Path:
    """The file for dark pages that belongs to the one for light pages."""
    return path.with_name(f"{path.stem}-dark{path.suffix}")


def is_drawn(path: Path) -> bool:
    """Whether a file is a PNG that :func:`save_figure` wrote."""
    return path.is_file() and b"Software\0hf_prune" in path.read_bytes()[:4096]


def _set_ink(drawn: Figure, ink: str) -> None:
    """Colour the texts and axes; texts that have a colour of the palette keep it."""
    from matplotlib.colors import to_hex
    from matplotlib.text import Text

    inks = {BOTH, LIGHT, DARK, "#000000"}
    for axes in drawn.axes:
        axes.tick_params(colors=ink, which="both")
        for spine in axes.spines.values():
            spine.set_edgecolor(ink)
    for text in drawn.findobj(Text):
        if to_hex(text.get_color()) in inks:
            text.set_color(ink)
