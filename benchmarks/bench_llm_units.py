"""Language models with fewer layers, heads and neurons: perplexity, measured speed, time and memory of the pruning.

Each row is pruned in a process of its own, calibrated on windows of unlabelled text, shrunk, and scored on windows of
another text. It has the ratio to the dense perplexity with its standard error, paired over the windows; the parameters
left; the CPU seconds of the pruning; the largest memory of its process, model and libraries included; and the measured
speed-up where the row asks for one.

    python benchmarks/bench_llm_units.py MODEL_FOLDER wiki.train.raw wiki.test.raw --rows "layers, greedy"
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import (
    AutoPrunedModelForCausalLM,
    Perplexity,
    compare_perplexity,
    evaluate_perplexity,
    load_texts,
    prune,
    shrink,
    token_windows,
)
from hf_prune.kernels.fast_products import fast_products
from hf_prune.utils.formatting import format_table

GENERATION = {"workload": {"prompt": 128, "new_tokens": 64}}
REPAIRED = {"repair": "least_squares"}
LAYERS = {"granularity": "layer", "sparsity": 0.2}
ROWS: dict[str, dict[str, Any]] = {
    "layers, magnitude": {**LAYERS, "criterion": "magnitude"},
    "layers, fisher": {**LAYERS, "criterion": "fisher"},
    "layers, greedy": {**LAYERS, "criterion": "greedy"},
    "layers, greedy, least squares": {**LAYERS, "criterion": "greedy", **REPAIRED},
    "layers, generation 1.25x": {"granularity": "layer", "target_speedup": 1.25, "preset": "balanced", **GENERATION},
    "heads and neurons, generation 1.25x": {"target_speedup": 1.25, "preset": "balanced", **GENERATION},
    "heads and neurons, generation 1.5x": {"target_speedup": 1.5, "preset": "balanced", **GENERATION},
}


def prune_row(args: argparse.Namespace) -> None:
    """Prune one row into a folder, and print what it took."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    batches = token_windows(load_texts(args.train, "train"), tokenizer, n=args.windows, length=args.length)
    start, before = time.process_time(), model.num_parameters()
    prune(model, calibration=batches, **ROWS[args.child])
    shrink(model)
    record = {
        "row": args.child,
        "cpu_seconds": time.process_time() - start,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "parameters": model.num_parameters() / before,
        "speed": model.config.pruned_structure.get("speed"),
        "layers": model.config.pruned_structure["layers"],
    }
    model.save_pretrained(args.into)
    print(json.dumps(record))


def score(args: argparse.Namespace, folder: Path) -> Perplexity:
    """The perplexity of a folder on the test windows, evenly drawn."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoPrunedModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options: dict[str, Any] = {"window": args.test_length, "limit": args.test_windows, "batch_size": 1}
    with fast_products(model.parameters()):
        return evaluate_perplexity(model, tokenizer, load_texts(args.test, "test"), **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("train", help="text to calibrate on")
    parser.add_argument("test", help="text to score")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="their tokens")
    parser.add_argument("--test-windows", type=int, default=24)
    parser.add_argument("--test-length", type=int, default=512)
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON")
    parser.add_argument("--child", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--into", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        prune_row(args)
        return
    dense = score(args, args.model)
    print(f"dense: {dense}", flush=True)
    records, rows = [], []
    for name in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *sys.argv, "--child", name, "--into", folder]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            comparison = compare_perplexity(dense, score(args, Path(folder)))
        record = {**json.loads(done.stdout.splitlines()[-1]), "perplexity": comparison.to_dict()}
        records.append(record)
        speed = record["speed"]
        rows.append(
            [
                name,
                str(comparison),
                f"{100 * record['parameters']:.1f} %",
                f"{record['cpu_seconds']:.0f} s",
                f"{record['peak_bytes'] / 2**20:.0f} MiB",
                "-" if speed is None else f"{speed['measured']:.2f}",
            ]
        )
        print(rows[-1], flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(records, indent=2) + "\n")
    print(format_table(["row", "perplexity", "parameters", "CPU", "peak", "speed-up"], rows, left=2))


if __name__ == "__main__":
    main()
