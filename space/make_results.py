"""Measure what the Space's fourth tab shows: the demo's model pruned in several ways. Writes results.json.

    python space/make_results.py --threads 1

Every point is pruned from the dense weights, scored on all held-out sentences of the demo, and timed beside the dense
model. It takes about half an hour on one core.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import tempfile
from pathlib import Path

import torch
from limits import Limits
from measuring import held_out
from models import load_dense
from sessions import DEMO
from tradeoff import measure

from hf_prune import load_classification
from hf_prune.cli.demo.assets import prepare_demo

HERE = Path(__file__).parent
METHODS = (
    ("Single weights", "magnitude", False),
    ("Single weights", "wanda", False),
    ("Single weights", "alps", False),
    ("Two of every four weights (2:4)", "alps", False),
    ("Heads and neurons", "magnitude", False),
    ("Heads and neurons", "fisher", True),
)
SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--calibration", type=int, default=128, help="sentences")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    assets = prepare_demo()
    with tempfile.TemporaryDirectory() as folder:
        dense = load_dense(DEMO, Path(assets.model_dir), None, Limits().parameters)
        texts = load_classification(str(assets.data_dir), "train")["sentence"][: args.calibration]
        data = held_out(str(assets.data_dir), assets.heldout_size)
        points = []
        for what, how, repair in METHODS:
            sparsities = [0.5] if what.endswith("(2:4)") else SPARSITIES
            for point in measure(dense, [(what, how, repair)], sparsities, data, texts, Path(folder), lambda *_: None):
                points.append(point)
                print(json.dumps(point), flush=True)
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("hf_prune", "torch", "transformers"))
    results = {
        "format_version": 1,
        "note": (
            f"{points[0]['n']} held-out sentences, {args.calibration} sentences to calibrate with, no training; times "
            f"of one sentence of 64 tokens, {platform.machine()} CPU, {args.threads} thread(s), {packages}."
        ),
        "dense": {"accuracy": points[0]["accuracy"] + points[0]["drop"], "file_bytes": dense.file_bytes},
        "points": points,
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
