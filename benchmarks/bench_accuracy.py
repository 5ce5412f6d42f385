"""Accuracy of pruning in one shot: methods by sparsities, calibrated on unlabelled training sentences, no training.

The encoder's Linears are pruned (pooler and classifier are left alone), and the dev set is scored. A drop is the mean
over the seeds, which choose the calibration sentences; its standard error is the paired one over the dev sentences,
of one seed. Methods without calibration do not depend on the seed.

    python benchmarks/bench_accuracy.py MODEL_FOLDER DATA_FOLDER --seeds 3 --out table.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_prune import (
    Evaluation,
    PruningConfig,
    compare,
    evaluate_classification,
    load_classification,
    prune,
    text_batches,
)
from hf_prune.plan import make_plan
from hf_prune.tables import format_table

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "magnitude + least squares": {"repair": "least_squares"},
    "wanda": {"criterion": "wanda", "scope": "row"},
    "wanda + least squares": {"criterion": "wanda", "scope": "row", "repair": "least_squares"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "alps": {"criterion": "alps"},
}
ENCODER = r".*\b(layer|layers|h|block)\.\d+\..*"


def config_for(method: str, amount: str) -> PruningConfig:
    """A sparsity such as ``0.5``, or a granularity such as ``2:4``."""
    settings = dict(METHODS[method])
    if ":" in amount:
        if settings.get("scope") == "row":
            settings.pop("scope")
        return PruningConfig(granularity=amount, target_modules=ENCODER, **settings)
    return PruningConfig(float(amount), target_modules=ENCODER, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a classifier")
    parser.add_argument("data", help="folder with train and dev splits, columns sentence and label")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--amounts", nargs="+", default=["0.5", "0.6", "0.7", "0.8", "0.9", "2:4"])
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    train, dev = load_classification(args.data, "train"), load_classification(args.data, "validation")
    score = evaluate_classification(dense, tokenizer, dev)
    plan = make_plan(dense, config_for("magnitude", "0.5"))
    print(f"dense: {100 * score.accuracy:.2f} of {len(dev)} sentences; ", end="")
    print(f"{plan.target_parameters:,} parameters in {len(plan.tensors)} weights are pruned; ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")

    def measure(method: str, amount: str, seed: int) -> tuple[Evaluation, float]:
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: args.sentences]
        texts = [train[int(i)]["sentence"] for i in chosen]
        model = copy.deepcopy(dense)
        start = time.perf_counter()
        prune(model, config_for(method, amount), calibration=text_batches(texts, tokenizer))
        seconds = time.perf_counter() - start
        return evaluate_classification(model, tokenizer, dev), seconds

    rows, records = [], []
    for method in args.methods:
        row = [method]
        spent = []
        for amount in args.amounts:
            calibrated = make_plan(dense, config_for(method, amount)).needs
            found = [measure(method, amount, seed) for seed in range(args.seeds if calibrated else 1)]
            drops = [100 * (score.accuracy - result.accuracy) for result, _ in found]
            error = compare(score, found[0][0]).drop_standard_error
            spent += [seconds for _, seconds in found]
            row.append(f"{statistics.mean(drops):.2f} ± {error:.2f}")
            records.append({"method": method, "amount": amount, "drops": drops, "se": error, "seconds": spent[-1]})
            print(f"{method:28} {amount:>5}  drop {row[-1]}  {drops}  {spent[-1]:.1f} s", flush=True)
        rows.append([*row, f"{statistics.median(spent):.1f} s"])
    print(format_table(["drop in points", *args.amounts, "median time"], rows, left=1))
    if args.out:
        args.out.write_text(json.dumps({"dense": score.accuracy, "results": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
