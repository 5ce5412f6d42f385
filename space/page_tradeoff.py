"""The fourth tab: what accuracy costs what size and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr
import panel
import tradeoff
import views
from components import HEAVY, QUICK, cancel_handler, explain_errors, show_progress, take_turn, visitor
from sessions import DEMO, Sessions

from hf_prune import HfPruneError

SPARSITIES = ("30 %", "50 %", "60 %", "70 %", "80 %", "90 %")
MOST_POINTS, SWEEP_SENTENCES = 6, 200
HEADERS = ("method", "sparsity", "accuracy", "drop ± s.e.", "sentences", "file", "speed", "measured")


def tradeoff_tab(sessions: Sessions, results: Mapping[str, Any]) -> None:
    is_demo = sessions.names[0] == DEMO
    methods = list(dict.fromkeys(p["method"] for p in results["points"]))
    gr.Markdown(
        "What accuracy costs what size and time. The points of hf_prune's demo model were measured before; measure a "
        "few of your own beneath."
    )
    with gr.Accordion("How they were measured", open=False):
        gr.Markdown(results["note"])
    state = gr.State(results["points"])
    with gr.Row():
        axis = gr.Radio(
            [("Sparsity", "sparsity"), ("File size", "size"), ("Time", "time")],
            value="sparsity",
            label="Against",
            min_width=260,
            elem_id="axis",
        )
        tolerance = gr.Slider(
            0.5,
            5,
            value=2,
            step=0.5,
            label="Accepted drop, points",
            info="With 95 % confidence.",
            min_width=260,
            elem_id="tolerance",
        )
    shown = gr.Dropdown(methods, value=methods, multiselect=True, label="Methods", elem_id="shown")
    spot = gr.Markdown(elem_id="spot", container=True)
    chart = gr.Plot(label="Trade-off", elem_id="chart")
    with gr.Accordion("All points as a table", open=False):
        table = gr.HTML(elem_id="points", apply_default_css=False)
    file = gr.DownloadButton("Download the table (CSV)", elem_id="csv")
    gr.Markdown(
        f"### Measure it here\nAt most {MOST_POINTS} points of {sessions.names[0]}, {SWEEP_SENTENCES} sentences each; "
        "takes a minute or more. "
        + ("They join the points above." if is_demo else "They take the place of the demo model's points.")
    )
    with gr.Row():
        which = gr.Dropdown(
            methods, value=methods[:2], multiselect=True, label="Methods to measure", min_width=280, elem_id="which"
        )
        how_much = gr.CheckboxGroup(
            SPARSITIES, value=["50 %", "80 %"], label="Sparsities", min_width=280, elem_id="how-much"
        )
    with gr.Row():
        go = gr.Button("Measure", variant="primary", elem_id="sweep")
        stop = gr.Button("Cancel")
        again = gr.Button("Forget them", elem_id="earlier")

    @explain_errors
    def draw(measured: Sequence[Mapping[str, Any]], axis: str, tolerance: float, shown: Sequence[str]) -> list[Any]:
        """The chart, the sweet spot, the table, and the file of the points."""
        points = [p for p in measured if p["method"] in (shown or [])]
        best = tradeoff.sweet_spot(points, axis, float(tolerance))
        doubt = next((p["doubt"] for p in points if p.get("doubt")), "")
        words = (
            f"**Warning:** no sweet spot is named, since {escape(doubt)}."
            if doubt
            else f"No point has a drop of at most {tolerance:g} points with 95 % confidence."
            if best is None
            else f"**Sweet spot:** {best['method']} at {100 * best['sparsity']:.0f} %: drop {best['drop']:.1f} points, "
            f"at most {best['drop_bound']:.1f} with 95 % confidence, n = {best['n']}; "
            f"{best['file_bytes'] / 1e6:.1f} MB, {views.speed(best)}."
        )
        file = tradeoff.write_csv(points, sessions.folder / "tables")
        rows = panel.table(
            HEADERS,
            views.tradeoff_rows(points),
            empty="No method is chosen: choose one above.",
            marked=[bool(p.get("here")) for p in points],
        )
        return [words, views.tradeoff(points, axis, best), rows, str(file)]

    outputs = [spot, chart, table, file]
    settings = [state, axis, tolerance, shown]
    # Without triggers: when the page opens, and when a setting or the points change.
    gr.on(None, draw, settings, outputs, api_name="tradeoff", trigger_mode="always_last", **QUICK)

    @explain_errors
    def sweep(
        which: Sequence[str],
        how_much: Sequence[str],
        known: Sequence[Mapping[str, Any]],
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Measure points of the first model of the list here."""
        unknown = [m for m in which or [] if m not in methods] + [s for s in how_much or [] if s not in SPARSITIES]
        if unknown:
            raise gr.Error(escape(f"{unknown[0]!r} is not on offer"), print_exception=False)
        count = len(which or []) * len(how_much or [])
        if not 0 < count <= MOST_POINTS:
            raise gr.Error(f"these are {count} points: choose 1 to {MOST_POINTS}", print_exception=False)
        chosen = [tradeoff.parse_method(name) for name in which]
        shares = [int(s.split()[0]) / 100 for s in how_much]
        points: list[dict[str, Any]] = []
        try:
            with take_turn(sessions, request):
                sessions.sweep(visitor(request), chosen, shares, SWEEP_SENTENCES, show_progress(progress), points)
        except HfPruneError as error:  # cancelled, or out of time: show what was measured
            if not points:
                raise
            gr.Warning(f"Only {len(points)} of {count} points were measured: {escape(str(error))}")
        new = [{**p, "here": True} for p in points]
        replaced = {(p["method"], p["sparsity"]) for p in new}
        others = [p for p in known if not p.get("here") and is_demo]  # points of another model are not comparable
        others += [p for p in known if p.get("here") and (p["method"], p["sparsity"]) not in replaced]
        return [[*others, *new], gr.Dropdown(value=list(which))]

    go.click(sweep, [which, how_much, state], [state, shown], api_name="sweep", show_progress_on=spot, **HEAVY)

    stop.click(cancel_handler(sessions), None, spot, api_name="cancel_sweep", queue=False, api_visibility="private")

    def earlier() -> list[Any]:
        """Back to what was measured before."""
        return [results["points"], gr.Dropdown(value=methods)]

    again.click(earlier, None, [state, shown], api_name="earlier", **QUICK)
