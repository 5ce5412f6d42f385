"""hf_prune as a Hugging Face Space; ``hf-prune space`` runs the same.

Settings come from the environment: ``HF_PRUNE_SPACE_MODEL`` and ``HF_PRUNE_SPACE_DATA`` name folders with the model of
the first tab and with labelled sentences that fit it; what a Space was pushed with lies beside this file, and without
either the demo's are made. ``HF_PRUNE_SPACE_HOSTS`` lists names under which it may be opened, besides localhost.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path

import gradio as gr
from guard import OwnPagesOnly, own_names
from pages import CSS, THEME, build
from starlette.middleware import Middleware
from studio import Limits, Studio
from tradeoff import read_results

from hf_prune.utils.json_files import read_json_object

HERE = Path(__file__).parent


def make(folder: Path, limits: Limits | None = None) -> tuple[Studio, gr.Blocks]:
    """The studio and its pages, with the settings of the environment.

    Args:
        folder: For what visitors make.
        limits: What they may ask for.
    """
    on_a_space = gr.utils.get_space() is not None
    model, data = os.environ.get("HF_PRUNE_SPACE_MODEL"), os.environ.get("HF_PRUNE_SPACE_DATA")
    names = {}
    if model is not None:
        names = {"name": Path(model).name, "data_name": Path(data).name if data else ""}
    elif (HERE / "demo").is_dir():  # as `hf-prune space --push` put it there
        model, found = str(HERE / "demo" / "model"), HERE / "demo" / "data"
        data = str(found) if found.is_dir() else None
        if (HERE / "demo" / "names.json").is_file():
            names = read_json_object(HERE / "demo" / "names.json")
    else:
        from hf_prune.cli.demo.demo import prepare_demo

        assets = prepare_demo(progress=False)
        model, data = str(assets.model_dir), str(assets.data_dir)
    sentences = (HERE / "sentences.txt").read_text(encoding="utf-8").splitlines()
    studio = Studio(folder, demo=model, data=data, sentences=sentences, limits=limits, public=on_a_space, **names)
    studio.check_own()
    results = read_results(HERE / "results.json")
    return studio, build(studio, results, login=on_a_space)


def _let_go(studio: Studio) -> None:
    while True:
        time.sleep(60)
        studio.drop_idle()


def main() -> None:
    """Serve it."""
    with tempfile.TemporaryDirectory(prefix="hf-prune-space-") as folder:
        studio, demo = make(Path(folder))
        threading.Thread(target=_let_go, args=(studio,), daemon=True).start()
        demo.queue(max_size=32, default_concurrency_limit=4, api_open=False)
        try:
            demo.launch(
                theme=THEME,
                css=CSS,
                ssr_mode=False,
                footer_links=["api", "settings"],
                max_file_size="1mb",
                share=False,
                server_name="0.0.0.0" if studio.public else "127.0.0.1",  # here, a push is yours
                app_kwargs={"middleware": [Middleware(OwnPagesOnly, names=own_names(os.environ))]},
                inbrowser=os.environ.get("HF_PRUNE_SPACE_OPEN") == "1",
            )
        finally:
            studio.close()


if __name__ == "__main__":
    main()
