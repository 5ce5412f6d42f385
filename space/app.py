"""hf_prune as a Hugging Face Space; ``hf-prune space`` runs the same.

Settings come from the environment: ``HF_PRUNE_SPACE_MODEL`` and ``HF_PRUNE_SPACE_DATA`` name folders with the first
model on the list and with labelled sentences that fit it. Otherwise they are what the Space was pushed with, in
``demo/`` beside this file, or else the demo's, which are made first. ``HF_PRUNE_SPACE_HOSTS`` lists names under which
the app may be opened, besides localhost.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from pathlib import Path

import gradio as gr
from guard import OwnPagesOnly, own_names
from look import CSS, THEME
from pages import build
from sessions import Sessions
from starlette.middleware import Middleware
from tradeoff import read_results

HERE = Path(__file__).parent


def make(folder: Path) -> tuple[Sessions, gr.Blocks]:
    """The sessions and their pages, with the settings of the environment.

    Args:
        folder: Where files of visitors go.
    """
    on_a_space = gr.utils.get_space() is not None
    model, data = os.environ.get("HF_PRUNE_SPACE_MODEL"), os.environ.get("HF_PRUNE_SPACE_DATA")
    names = {}
    if model is not None:
        names = {"name": Path(model).name, "data_name": Path(data).name if data else ""}
    elif (HERE / "demo").is_dir():  # as `hf-prune space --push` put it there
        model, demo_data = str(HERE / "demo" / "model"), HERE / "demo" / "data"
        data = str(demo_data) if demo_data.is_dir() else None
        if (HERE / "demo" / "names.json").is_file():
            names = json.loads((HERE / "demo" / "names.json").read_text(encoding="utf-8"))
    else:
        from hf_prune.cli.demo.assets import prepare_demo

        assets = prepare_demo(progress=False)
        model, data = str(assets.model_dir), str(assets.data_dir)
    sentences = (HERE / "sentences.txt").read_text(encoding="utf-8").splitlines()
    sessions = Sessions(folder, demo=model, data=data, sentences=sentences, public=on_a_space, **names)
    sessions.check_own_model()
    results = read_results(HERE / "results.json")
    return sessions, build(sessions, results, login=on_a_space)


def _drop_idle_sessions(sessions: Sessions) -> None:
    while True:
        time.sleep(60)
        sessions.drop_idle()


def main() -> None:
    """Serve it."""
    with tempfile.TemporaryDirectory(prefix="hf-prune-space-") as folder:
        sessions, demo = make(Path(folder))
        threading.Thread(target=_drop_idle_sessions, args=(sessions,), daemon=True).start()
        demo.queue(max_size=32, default_concurrency_limit=4, api_open=False)
        try:
            demo.launch(
                theme=THEME,
                css=CSS,
                ssr_mode=False,
                footer_links=["api", "settings"],
                max_file_size="1mb",
                share=False,
                server_name="0.0.0.0" if sessions.public else "127.0.0.1",  # a push here uses your own token
                app_kwargs={"middleware": [Middleware(OwnPagesOnly, names=own_names(os.environ))]},
                inbrowser=os.environ.get("HF_PRUNE_SPACE_OPEN") == "1",
            )
        finally:
            sessions.close()


if __name__ == "__main__":
    main()
