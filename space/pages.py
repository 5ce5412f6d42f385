"""The pages: five tabs over :class:`sessions.Sessions`. Every action has a named endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from components import visitor
from page_compare import compare_tab
from page_prune import prune_tab, see_tab, wire
from page_publish import publish_tab
from page_tradeoff import tradeoff_tab
from sessions import Sessions

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
THEME = gr.themes.Soft(primary_hue="blue", font=FONTS, font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"])
CSS = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")


def build(sessions: Sessions, results: Mapping[str, Any], *, login: bool) -> gr.Blocks:
    """The app.

    Args:
        sessions: The visitors' models.
        results: The measurements of ``make_results.py``.
        login: Whether visitors log in with Hugging Face to publish, as on a Space; else the machine's token is used.
    """
    with gr.Blocks(
        title="hf_prune: prune, see, compare, publish",
        analytics_enabled=False,
        fill_width=False,
        delete_cache=(600, 3600),
    ) as demo:
        gr.Markdown(
            "# Prune a model, and see what it costs\n"
            "Take weights, heads, neurons or layers out of a text classifier, look at what is left, and compare its "
            "answers with those of the dense model. Everything shown here is measured, with "
            "[hf_prune](https://pypi.org/project/hf-prune/).",
            elem_id="top",
        )
        if login:
            with gr.Row(elem_id="account"):
                gr.Markdown("To push a model to your account, log in **before** you prune: it reloads this page.")
                gr.LoginButton(size="sm", elem_id="login")
        with gr.Tabs():
            with gr.Tab("1 Prune", id="prune"):
                choose = prune_tab(sessions)
            with gr.Tab("2 See", id="see"):
                seen = see_tab(sessions)
            with gr.Tab("3 Compare", id="compare"):
                compare_tab(sessions)
            with gr.Tab("4 Trade-off", id="tradeoff"):
                tradeoff_tab(sessions, results)
            with gr.Tab("5 Publish", id="publish"):
                publish_tab(sessions, login)
        wire(sessions, choose, seen)

        def leave(request: gr.Request) -> None:
            sessions.forget(visitor(request))

        demo.unload(leave)
    return demo
