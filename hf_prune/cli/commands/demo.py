"""hf-prune demo: options, help, and what it prints."""

from __future__ import annotations

import functools
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.console import echo, resumable, show
from hf_prune.cli.options import AsJson, Overwrite
from hf_prune.cli.startup import start
from hf_prune.utils.formatting import format_duration


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pruned checkpoints and the picture.")] = Path(
        "hf-prune-demo"
    ),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Prune a small sentiment classifier in four ways and compare them; needs neither the Hub nor your data."""
    from hf_prune.cli.demo.assets import prepare_demo
    from hf_prune.cli.workflows.demo import run_demo
    from hf_prune.utils.figures import save_figure

    begin, say = time.perf_counter(), functools.partial(echo, err=as_json)
    start([])
    assets = prepare_demo(echo=say)
    with resumable(f"The demo's model is in {assets.model_dir}"):
        result = run_demo(assets.model_dir, assets.data_dir, out, overwrite=overwrite, say=say)
        picture = save_figure(result.plot(), out / "demo.png")
    if not as_json:
        echo()
    program = "hf-prune" if shutil.which("hf-prune") else sys.argv[0]
    show(
        result,
        as_json,
        f"\nSaved in {out}, with a picture: {picture}. Done in {format_duration(time.perf_counter() - begin)}.",
        "Now on your model: several methods tried, the best within one point kept",
        f"  {program} auto MODEL --data DATA --goal faster --max-drop 1 --out faster",
        f"  {program} auto MODEL --data DATA --goal smaller --max-drop 1 --out smaller",
    )
