"""The second tab: what is left of a model, and how fast it is."""

from __future__ import annotations

from typing import Any

import gradio as gr
import panel
import views
from session import Session


def see_tab() -> tuple[list[Any], list[Any], Any]:
    """What is shown of a pruned model, what is shown of its measurements, and the button that measures."""
    gr.Markdown("What was removed, and what remains.")
    with gr.Row():
        with gr.Column(min_width=300):
            gr.Markdown("### Sizes")
            sizes = gr.HTML(
                panel.table([], [], empty="Prune a model first: its sizes then stand here."),
                elem_id="sizes",
                apply_default_css=False,
            )
            gr.Markdown("### Time of a sentence")
            times = gr.HTML(panel.times({}), elem_id="times", apply_default_css=False)
            again = gr.Button("Measure again", elem_id="measure")
            words = gr.Markdown(elem_id="speed", container=True)
        with gr.Column(min_width=300):
            weights = gr.Plot(label="Weights before and after", elem_id="weights")
    with gr.Row():
        with gr.Column(min_width=300):
            units = gr.Plot(label="Heads and neurons: blue remains, orange was removed", elem_id="units")
        with gr.Column(min_width=300):
            layers = gr.Plot(label="Removed share of each matrix", elem_id="layers")
    return [sizes, weights, units, layers], [times, words], again


def pictures(session: Session) -> list[Any]:
    """What the tab shows of a pruned model."""
    return [
        panel.sizes(session.facts),
        views.histogram(*session.histograms),
        views.unit_maps(session.units),
        views.layers(session.removed_shares),
    ]
