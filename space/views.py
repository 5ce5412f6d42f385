"""Figures and pieces of HTML. Everything that a visitor typed is escaped."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hf_prune.utils.figures import PALETTE, lines_of
from hf_prune.utils.formatting import format_count

TEXT, GRID = "#7c8796", "rgba(128,140,155,0.25)"
BLUE, ORANGE, GREEN = PALETTE[:3]
DENSE = "#8a94a3"  # the dense model, everywhere
MARKS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "pentagon")
_COLUMNS = 96  # of a map: more units share a cell


def figure_of(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    """Give a figure the common look, readable on light, dark and narrow pages."""
    figure.update_layout(
        height=height,
        autosize=True,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": TEXT, "size": 13, "family": "system-ui, sans-serif"},
        margin={"l": 8, "r": 12, "t": 52, "b": 8},
        legend={"orientation": "h", "yanchor": "top", "y": -0.2, "x": 0},
        **layout,
    )
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=GRID, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=GRID, automargin=True)
    return figure


def histogram(before: Mapping[str, Any], after: Mapping[str, Any]) -> go.Figure:
    """Weights that are not zero, before and after."""
    figure = go.Figure()
    for name, bins, colour in (("dense", before, DENSE), ("pruned", after, BLUE)):
        middle = [(a + b) / 2 for a, b in itertools.pairwise(bins["edges"])]
        total = sum(bins["counts"]) + bins["zeros"]
        figure.add_trace(
            go.Scatter(
                x=middle,
                y=bins["counts"],
                name=f"{name}: {100 * bins['zeros'] / max(total, 1):.1f} % of {format_count(total)} are zero",
                line={"color": colour, "shape": "hvh", "width": 2},
                fill="tozeroy",
                fillcolor=_faint(colour, 0.25),
                hovertemplate="%{y:,} weights near %{x:.3f}<extra></extra>",
            )
        )
    figure.update_xaxes(title="weight")
    figure.update_yaxes(title="weights that are not zero")
    return figure_of(figure, 400)


def _faint(colour: str, opacity: float) -> str:
    return f"rgba({int(colour[1:3], 16)},{int(colour[3:5], 16)},{int(colour[5:7], 16)},{opacity})"


def layers(removed_shares: Mapping[str, float]) -> go.Figure:
    """The share of each matrix that is zero or was cut out."""
    short = [
        re.sub(r"^.*?\.(?=\d+\.)", "", name.removesuffix(".weight")) for name in removed_shares
    ]  # from the layer's number on
    figure = go.Figure(
        go.Bar(
            x=[100 * share for share in removed_shares.values()],
            y=short,
            orientation="h",
            marker={"color": BLUE},
            hovertemplate="%{y}: %{x:.1f} % removed<extra></extra>",
        )
    )
    figure.update_xaxes(title="removed, %", range=[0, 100])
    figure.update_yaxes(autorange="reversed", tickfont={"size": 10})
    return figure_of(figure, max(260, 17 * len(removed_shares) + 100))


def unit_maps(units: Mapping[str, list[bool]]) -> go.Figure | None:
    """Heads and neurons of each layer: blue remains, orange was removed; None if whole units were not pruned."""
    kinds = [kind for kind in ("head", "neuron") if any(name.startswith(kind) for name in units)]
    if not kinds:
        return None
    figure = make_subplots(
        rows=len(kinds),
        cols=1,
        subplot_titles=[f"{k.capitalize()}s of each layer" for k in kinds],
        vertical_spacing=0.16,
    )
    for row, kind in enumerate(kinds, 1):
        chosen = {name: kept for name, kept in units.items() if name.startswith(kind)}
        cells, notes = [], []
        for kept in chosen.values():
            parts = _cells(kept)
            cells.append([sum(part) / len(part) for part in parts])
            notes.append([f"{sum(part)} of {len(part)} left" for part in parts])
        figure.add_trace(
            go.Heatmap(
                z=cells,
                text=notes,
                x=list(range(1, len(cells[0]) + 1)) if kind == "head" else None,
                y=[f"layer {i}: {sum(k)} of {len(k)}" for i, k in enumerate(chosen.values())],
                zmin=0,
                zmax=1,
                xgap=2 if kind == "head" else 0,
                ygap=2,
                colorscale=[[0, _faint(ORANGE, 0.55)], [1, BLUE]],
                showscale=False,
                hovertemplate="%{y}<br>%{text}<extra></extra>",
            ),
            row=row,
            col=1,
        )
        figure.update_yaxes(autorange="reversed", row=row, col=1)
        figure.update_xaxes(showticklabels=kind == "head", dtick=1, row=row, col=1)
    figure_of(figure, 130 + sum(60 + 26 * sum(n.startswith(k) for n in units) for k in kinds))
    return figure.update_layout(margin={"t": 84})


def _cells(kept: list[bool]) -> list[list[bool]]:
    step = max(1, -(-len(kept) // _COLUMNS))
    return [kept[i : i + step] for i in range(0, len(kept), step)] or [[False]]


def side_by_side(text: str, labels: Sequence[str], dense: Sequence[float], pruned: Sequence[float]) -> str:
    """The answers of both models to a sentence, with what differs in bold."""
    best = [max(range(len(labels)), key=lambda i: values[i]) for values in (dense, pruned)]
    agree = best[0] == best[1]
    verdict = (
        f"Both say <strong>{escape(labels[best[0]])}</strong>."
        if agree
        else f"They disagree: dense says <strong>{escape(labels[best[0]])}</strong>, pruned says "
        f"<strong>{escape(labels[best[1]])}</strong>."
    )
    largest = max(abs(a - b) for a, b in zip(dense, pruned, strict=True))
    rows = "".join(
        f"<tr><th scope='row'>{escape(label)}</th><td>{_bar(a, 'dense')}</td><td>{_bar(b, 'pruned')}</td>"
        f"<td class='{'differs' if abs(b - a) == largest and largest >= 0.005 else ''}'>{100 * (b - a):+.1f}</td></tr>"
        for label, a, b in zip(labels, dense, pruned, strict=True)
    )
    return (
        f"<div class='answer {'agree' if agree else 'disagree'}'><p class='sentence'>{escape(text)}</p><p>{verdict}</p>"
        f"<table><thead><tr><th scope='col'>class</th><th scope='col'>dense</th><th scope='col'>pruned</th>"
        f"<th scope='col'>points</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _bar(share: float, kind: str) -> str:
    return f"<div class='bar {kind}'><span style='width:{100 * share:.1f}%'></span><em>{100 * share:.1f} %</em></div>"


def tradeoff(points: Sequence[Mapping[str, Any]], axis: str, best: Mapping[str, Any] | None) -> go.Figure:
    """Accuracy against sparsity, size or time, one line per method, the sweet spot marked.

    What was measured before has whole lines, what was measured here dashed ones with open markers; the dense model's
    accuracy is a line for each number of sentences.
    """
    title, value = {
        "sparsity": ("sparsity of what may go, %", lambda p: 100 * p["sparsity"]),
        "size": ("compressed file, MB", lambda p: p["file_bytes"] / 1e6),
        "time": ("time of a sentence, % of dense", lambda p: 100 / p["speedup"]),
    }[axis]
    figure = go.Figure()
    numbers = {method: i % len(PALETTE) for i, method in enumerate(dict.fromkeys(p["method"] for p in points))}
    for here in (False, True):
        chosen = [p for p in points if bool(p.get("here")) is here]
        lines = lines_of(chosen, lambda p: p["method"], lambda p: p["sparsity"], lambda p: p["accuracy"])
        for method, line in lines.items():
            number = numbers[method]
            symbol = MARKS[number % len(MARKS)]
            figure.add_trace(
                go.Scatter(
                    x=[value(p) for p in line],
                    y=[p["accuracy"] for p in line],
                    error_y={"array": [p["drop_standard_error"] for p in line], "thickness": 1, "width": 3},
                    name=f"{method} (here, n = {line[0]['n']})" if here else method,
                    mode="lines+markers",
                    line={"color": PALETTE[number], "width": 2, "dash": "dash" if here else "solid"},
                    marker={"symbol": f"{symbol}-open" if here else symbol, "size": 11 if here else 8},
                    text=[
                        f"{100 * p['sparsity']:.0f} % sparse: {p['accuracy']:.1f} %, drop {p['drop']:.1f} ± "
                        f"{p['drop_standard_error']:.1f}, n = {p['n']}; {p['file_bytes'] / 1e6:.1f} MB; {speed(p)}"
                        for p in line
                    ],
                    hovertemplate="%{text}<extra>%{fullData.name}</extra>",
                )
            )
    dense = {p["n"]: p["accuracy"] + p["drop"] for p in points}
    for place, (n, accuracy) in enumerate(sorted(dense.items(), reverse=True)):
        side = ("top right", "bottom right")[place % 2]
        line_style = {"color": DENSE, "dash": "dot"}
        figure.add_hline(y=accuracy, line=line_style, annotation_text=f"dense, n = {n}", annotation_position=side)
    if best is not None:
        figure.add_trace(
            go.Scatter(
                x=[value(best)],
                y=[best["accuracy"]],
                name="sweet spot",
                mode="markers+text",
                text=["sweet spot"],
                textposition="top center",
                marker={"symbol": "star", "size": 20, "color": "#e0b000", "line": {"color": "#5b4a00", "width": 1}},
                hovertemplate=f"{escape(best['method'])}, {100 * best['sparsity']:.0f} %<extra>sweet spot</extra>",
            )
        )
    figure.update_xaxes(title=title)
    figure.update_yaxes(title="accuracy, %")
    return figure_of(figure, 440 + 22 * len(figure.data))


def speed(point: Mapping[str, Any]) -> str:
    return f"{point['speedup']:.2f}× as fast" if point["faster"] else "not faster"


def tradeoff_rows(points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows for a table: method, sparsity, accuracy, drop, sentences, file, speed, and where it was measured."""
    return [
        [
            p["method"],
            f"{100 * p['sparsity']:.0f} %",
            f"{p['accuracy']:.1f} %",
            f"{p['drop']:.1f} ± {p['drop_standard_error']:.1f}",
            f"{p['n']}",
            f"{p['file_bytes'] / 1e6:.1f} MB",
            speed(p),
            "here" if p.get("here") else "before",
        ]
        for p in points
    ]
