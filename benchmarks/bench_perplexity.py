"""Perplexity after pruning in one shot: methods by sparsities, calibrated on unlabelled text, no training.

All Linears but the output embedding are pruned. Each row has the ratio to the dense perplexity with its standard error,
paired over the test windows; the seconds of pruning, calibration included; and the peak growth of memory while pruning.
torch.nn.utils.prune, the first row, prunes the same Linears by L1 norm, layer by layer.

    python benchmarks/bench_perplexity.py MODEL_FOLDER wiki.train.raw wiki.test.raw --out table.json
    python benchmarks/bench_perplexity.py model.gguf wiki.train.raw wiki.test.raw --windows 16 --test-windows 40
    python benchmarks/bench_perplexity.py STORY_MODEL_FOLDER --stories

A GGUF file needs the package ``gguf`` and is dequantized to float32. With ``--stories``, for a model that was trained
on short stories, the texts are stories that the dense model tells (sampled with a seed, others for calibration than for
the test): the pruned model's cross-entropy on them exceeds the dense one's by its divergence from the dense model.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from harness import memory, start_of_peak
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import PruningConfig, compare_perplexity, evaluate_perplexity, load_texts, prune, token_windows
from hf_prune.planning.make_plan import make_plan
from hf_prune.utils.formatting import format_table

L1 = "torch.nn.utils.prune L1"
METHODS: dict[str, dict[str, Any]] = {
    L1: {},
    "magnitude": {},
    "wanda": {"criterion": "wanda", "scope": "row"},
    "magnitude + least squares": {"repair": "least_squares"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "alps": {"criterion": "alps"},
}


def load(path: Path) -> tuple[Any, Any]:
    """A folder that save_pretrained wrote, or a GGUF file."""
    if path.suffix == ".gguf":
        where, options = path.parent, {"gguf_file": path.name}
    else:
        where, options = path, {}
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options).eval(), tokenizer


def tell_stories(model: Any, tokenizer: Any, n: int, seed: int, length: int = 256) -> list[str]:
    """Texts that a model samples from its start token."""
    starts = torch.full((n, 1), tokenizer.bos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = model.generate(
            starts,
            attention_mask=torch.ones_like(starts),
            do_sample=True,
            top_k=0,
            max_new_tokens=length,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def config_for(method: str, amount: str) -> PruningConfig:
    """A sparsity such as ``0.5``, or a granularity such as ``2:4``."""
    settings = dict(METHODS[method])
    if ":" in amount:
        settings.pop("scope", None)
        return PruningConfig(granularity=amount, **settings)
    return PruningConfig(float(amount), **settings)


def prune_with_torch(model: nn.Module, config: PruningConfig) -> None:
    for planned in make_plan(model, config).tensors:
        module = model.get_submodule(planned.target.module)
        torch_prune.l1_unstructured(module, "weight", config.sparsity)
        torch_prune.remove(module, "weight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a causal language model, or a GGUF file")
    parser.add_argument("train", nargs="?", help="text file or folder to calibrate on")
    parser.add_argument("test", nargs="?", help="text file or folder to score")
    parser.add_argument("--stories", action="store_true", help="the model's own stories instead of texts")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--amounts", nargs="+", default=["0.5", "0.6", "2:4"])
    parser.add_argument("--windows", type=int, default=128, help="calibration windows")
    parser.add_argument("--test-windows", type=int, help="test windows; all of the text by default")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch-size", type=int, default=4, help="windows at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON")
    args = parser.parse_args()
    if args.stories == bool(args.train and args.test):
        parser.error("name a training and a test text, or pass --stories")

    dense, tokenizer = load(args.model)
    if args.stories:
        stories = max(64, 2 * args.windows * args.length // 256)
        train, test = (tell_stories(dense, tokenizer, n, args.seed + i) for i, n in enumerate((stories, 128)))
    else:
        train, test = load_texts(args.train, "train"), load_texts(args.test, "test")
    batches = token_windows(
        train, tokenizer, n=args.windows, length=args.length, batch_size=args.batch_size, seed=args.seed
    )
    plan = make_plan(dense, PruningConfig())
    windows = sum(len(batch["input_ids"]) for batch in batches)
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    targets = f"{plan.target_parameters:,} of {plan.total_parameters:,} parameters, in {len(plan.tensors)} weights"
    print(f"{targets}, are pruned")
    print(f"calibrated on {windows} windows of {args.length} tokens, seed {args.seed}")
    print(f"{threads}, torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
    options = {"window": args.length, "limit": args.test_windows, "batch_size": args.batch_size}
    score = evaluate_perplexity(dense, tokenizer, test, **options)
    print(f"dense: {score}, {score.seconds:.0f} s", flush=True)

    rows, records = [], []
    for amount in args.amounts:
        for method in args.methods:
            if method == L1 and ":" in amount:
                continue  # torch has no N:M
            config = config_for(method, amount)
            model = copy.deepcopy(dense)
            before, start = start_of_peak(), time.perf_counter()
            if method == L1:
                prune_with_torch(model, config)
            else:
                prune(model, config, calibration=batches)
            seconds, extra = time.perf_counter() - start, memory("VmHWM") - before
            comparison = compare_perplexity(score, evaluate_perplexity(model, tokenizer, test, **options))
            error = "" if comparison.ratio_standard_error is None else f" ± {comparison.ratio_standard_error:.3f}"
            row = [method, amount, f"{comparison.pruned_perplexity:.2f}", f"{comparison.ratio:.3f}{error}"]
            rows.append([*row, f"{seconds:.1f} s", f"{extra / 1e6:.0f} MB"])
            record = {"method": method, "amount": amount, "seconds": seconds, "extra": extra}
            records.append({**record, **comparison.to_dict()})
            print("  ".join(rows[-1]), flush=True)
    header = ["method", "sparsity", "perplexity", "times the dense one", "time", "extra memory"]
    print(f"\ndense {score.perplexity:.2f}, n = {score.n} windows of {score.window} tokens\n")
    print(format_table(header, rows, left=1))
    if args.out:
        args.out.write_text(json.dumps({"dense": score.to_dict(), "results": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
