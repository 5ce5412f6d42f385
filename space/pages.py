"""The pages: five tabs over :class:`sessions.Sessions`. Every action has a named endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
from components import visitor
from look import MARK
from page_compare import compare_tab
from page_prune import prune_tab, wire
from page_publish import publish_tab
from page_see import see_tab
from page_tradeoff import tradeoff_tab
from sessions import Sessions

TOP = f"""<div>{MARK}</div><div><h1>Prune a model, and see what it costs</h1>
<p>Make a text classifier faster or smaller, and see at once how right it still is. Every number is measured here, with
<a href="https://pypi.org/project/hf-prune/" target="_blank" rel="noopener">hf_prune</a>.</p></div>"""


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
        gr.HTML(f"<div id='top'>{TOP}</div>", apply_default_css=False)
        if login:
            with gr.Row(elem_id="account"):
                gr.Markdown("To push a model to your account, log in **before** you prune: it reloads this page.")
                gr.LoginButton(size="sm", elem_id="login")
        with gr.Tabs():
            with gr.Tab("1 Prune", id="prune"):
                parts = prune_tab(sessions)
            with gr.Tab("2 See", id="see"):
                seen, measured, again = see_tab()
            with gr.Tab("3 Compare", id="compare"):
                compare_tab(sessions)
            with gr.Tab("4 Trade-off", id="tradeoff"):
                tradeoff_tab(sessions, results)
            with gr.Tab("5 Publish", id="publish"):
                publish_tab(sessions, login)
        wire(sessions, parts, seen, measured, again)

        def leave(request: gr.Request) -> None:
            sessions.forget(visitor(request))

        demo.unload(leave)
    return demo
