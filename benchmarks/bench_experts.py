"""Experts of a small mixture removed by each criterion: perplexity, parameters, file size and time.

A Qwen3-MoE (4 layers, 16 experts, top-2, about 5 million parameters) and its tokenizer are trained on a text, once for
each seed, so that its routers have something to say; then shares of its experts are removed in one shot, with no
training after it. REAP and frequency see windows of the training text; random is drawn several times for each model.
Perplexities are of a text that neither training nor calibration has seen; spreads are over the trained models.

    python benchmarks/bench_experts.py wiki.train.raw wiki.test.raw --out experts

Trained models and results lie in the folder of --out, and what is there is not computed again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_prune import evaluate_perplexity, measure_latency, prune, shrink, token_windows
from hf_prune.utils.formatting import format_table

METHODS: dict[str, dict[str, Any]] = {
    "reap": {"criterion": "reap"},
    "reap, freely per layer": {"criterion": "reap", "scope": "global"},
    "frequency": {"criterion": "frequency"},
    "magnitude": {"criterion": "magnitude"},
    "random": {"criterion": "random"},
}
VOCABULARY, LENGTH, BATCH = 2000, 128, 16


def read_texts(path: str) -> list[str]:
    return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def tokenizer_of(folder: Path, texts: list[str]) -> Any:
    if not (folder / "tokenizer.json").is_file():
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(texts, VOCABULARY, special_tokens=["<pad>", "<eos>"])
        fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>")
        fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def trained(folder: Path, tokenizer: Any, texts: list[str], steps: int, seed: int) -> Any:
    """A model of a seed, trained if it is not in the folder yet."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,
                intermediate_size=192,
                moe_intermediate_size=192,
                num_experts=16,
                num_experts_per_tok=2,
                norm_topk_prob=True,
                router_aux_loss_coef=0.01,
                output_router_logits=True,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
            )
        )
        windows = token_windows(texts, tokenizer, n=10**6, length=LENGTH, batch_size=BATCH, seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.95))
        warmup = max(1, steps // 20)
        start = time.perf_counter()
        for step in range(steps):
            cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * max(0.02, step / warmup if step < warmup else cosine)
            ids = windows[step % len(windows)]["input_ids"]
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                seconds = time.perf_counter() - start
                print(f"seed {seed}, step {step}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
        model.config.output_router_logits = False
        model.save_pretrained(folder)
    return Qwen3MoeForCausalLM.from_pretrained(folder).eval()


def file_size(model: Any, folder: Path) -> int:
    model.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measured(args: argparse.Namespace, dense: Any, tokenizer: Any, train: list[str], test: list[str], seed: int) -> Any:
    """Results of one trained model: (method, share, draw) -> perplexity, parameters, bytes, and seconds of pruning."""
    windows = token_windows(train, tokenizer, n=args.windows, length=LENGTH, batch_size=BATCH, seed=1000 + seed)

    def score(model: Any) -> float:
        scored = evaluate_perplexity(model, tokenizer, test, window=LENGTH, batch_size=BATCH, limit=args.test_windows)
        return scored.perplexity

    folder = args.out / "pruned"
    rows = [{"method": "dense", "share": 0.0, "perplexity": score(dense), "parameters": dense.num_parameters(),
             "bytes": file_size(dense, folder / "dense")}]  # fmt: skip
    for share in args.shares:
        for method, settings in METHODS.items():
            for draw in range(args.draws if method == "random" else 1):
                model, start = copy.deepcopy(dense), time.perf_counter()
                prune(model, share, granularity="expert", seed=100 * seed + draw, calibration=windows, **settings)
                seconds = time.perf_counter() - start
                shrink(model)
                rows.append(
                    {"method": method, "share": share, "perplexity": score(model), "seconds": seconds,
                     "parameters": model.num_parameters(), "bytes": file_size(model, folder / f"{method} {share}")}
                )  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def timed(dense: Any, out: Path, shares: list[float]) -> Any:
    models = {"dense": dense}
    for share in shares:
        models[f"{share:g} of the experts gone"] = shrink(prune(copy.deepcopy(dense), share, granularity="expert"))
    result = measure_latency(models, batch_sizes=[1, 16], lengths=[LENGTH], rounds=20)
    print(result)
    (out / "latency.txt").write_text(f"{result}\n")


def table(rows: list[dict[str, Any]]) -> str:
    cells = []
    for share, method in dict.fromkeys((row["share"], row["method"]) for row in rows):
        by_seed: dict[int, list[float]] = {}
        same = [row for row in rows if (row["share"], row["method"]) == (share, method)]
        for row in same:
            by_seed.setdefault(row["seed"], []).append(row["perplexity"])
        means = [statistics.mean(values) for values in by_seed.values()]
        spread = statistics.stdev(means) if len(means) > 1 else float("nan")
        dense = [row["perplexity"] for row in rows if row["method"] == "dense"]
        ratio = statistics.mean(a / b for a, b in zip(means, dense, strict=True))
        cells.append(
            [f"{100 * share:.0f} %", method, f"{statistics.mean(means):.1f} ± {spread:.1f}", f"{ratio:.2f}",
             f"{same[0]['parameters']:,}", f"{same[0]['bytes'] / 1e6:.1f} MB", str(len(same))]
        )  # fmt: skip
    return format_table(["experts gone", "criterion", "perplexity", "ratio", "parameters", "file", "n"], cells, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="text file to train and calibrate on")
    parser.add_argument("test", help="text file to score")
    parser.add_argument("--seeds", type=int, default=3, help="models to train")
    parser.add_argument("--steps", type=int, default=300, help=f"of {BATCH} windows of {LENGTH} tokens")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--draws", type=int, default=3, help="of random experts, for each model")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows")
    parser.add_argument("--test-windows", type=int, default=200, help=f"of {LENGTH} tokens")
    parser.add_argument("--out", type=Path, default=Path("experts"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = read_texts(args.train), read_texts(args.test)
    tokenizer = tokenizer_of(args.out / "tokenizer", train)
    path, rows, start = args.out / "results.json", [], time.perf_counter()
    if path.is_file():
        rows = json.loads(path.read_text())
    for seed in range(args.seeds):
        dense = trained(args.out / f"model-{seed}", tokenizer, train, args.steps, seed)
        if not any(row["seed"] == seed for row in rows):
            rows += [{"seed": seed, **row} for row in measured(args, dense, tokenizer, train, test, seed)]
            path.write_text(json.dumps(rows, indent=1))
    timed(dense, args.out, args.shares)
    print(table(rows))
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
