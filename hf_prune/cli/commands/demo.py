"""hf-prune demo: options, help, and what it prints."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.console import echo, resumable, say_if_continuing, sweep_files
from hf_prune.cli.options import Overwrite, Restart
from hf_prune.cli.startup import start
from hf_prune.evaluation.tasks import ClassificationTask
from hf_prune.planning.config import PruningConfig


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results, plots and the pruned checkpoint.")] = Path(
        "hf-prune-demo"
    ),
    restart: Restart = False,
    overwrite: Overwrite = False,
) -> None:
    """Prune a small sentiment classifier from start to finish; needs neither the Hub nor your data."""
    from hf_prune.cli.demo.assets import prepare_demo
    from hf_prune.cli.workflows.prune import prune_checkpoint
    from hf_prune.cli.workflows.sweep import sweep_checkpoint

    begin = time.perf_counter()
    start([])
    assets = prepare_demo(echo=echo)
    program = "hf-prune" if shutil.which("hf-prune") else sys.argv[0]
    arguments = [program, "sweep", str(assets.model_dir), "--data", str(assets.data_dir), "--out", str(out)]
    echo(f"\nScoring it at several sparsities. The same by hand:\n  {' '.join(arguments)}\n")
    say_if_continuing(out, restart)
    model, data = str(assets.model_dir), ClassificationTask(str(assets.data_dir))
    with resumable():
        result = sweep_checkpoint(
            model, data, out, restart=restart, name="demo model", data_name="Rotten Tomatoes", overwrite=overwrite
        )
    echo(f"{result}\n{sweep_files(out)}")
    best = result.sweet_spot
    sparsity = best.sparsity if best is not None else min(p.sparsity for p in result.points)
    chosen = "the sweet spot" if best is not None else "the smallest of them, since there is no sweet spot"
    pruned = out / "pruned"
    echo(f"\nPruning at {100 * sparsity:g} %, {chosen}. The same by hand:")
    echo(f"  {program} prune {assets.model_dir} --sparsity {sparsity:g} --out {pruned} --plots\n")
    report = prune_checkpoint(
        model, PruningConfig(sparsity=sparsity), pruned, plots=True, name="demo model", overwrite=overwrite
    )
    echo(report.summary())
    echo(
        f"\nSaved, with its report and two plots, in {pruned}. Plain transformers loads it:\n"
        f"  AutoModelForSequenceClassification.from_pretrained({str(pruned)!r})\n"
        f"Done in {time.perf_counter() - begin:.0f} s."
    )
