"""Language models after pruning without training: perplexity on two texts, CPU time, and peak memory.

All Linears but the output embedding are pruned. Each row is measured in a process of its own and written down at once,
so that an interrupted benchmark goes on where it was. The table has the perplexities with the standard error of their
ratio to the dense ones, paired over the windows; the increase of log-perplexity as a share of that of SparseGPT; the
CPU seconds of the pruning, calibration included; and the peak of resident memory of the process that pruned.

    python benchmarks/bench_llm.py MODEL_FOLDER wiki.train.raw wiki.test.raw --second sst2 --out llm
    python benchmarks/bench_llm.py MODEL_FOLDER wiki.train.raw wiki.test.raw --peer-python peer/bin/python --out llm
    python benchmarks/bench_llm.py STORY_MODEL_FOLDER --stories --out stories

``--peer-python`` is the interpreter of an environment with llm-compressor, which wants other versions of transformers:
its SparseGPT gets the same windows of tokens, and its weights are scored by the same code as all others. With
``--stories``, for a model that was trained on short stories, the texts are stories that the dense model tells (sampled
with a seed, others for calibration than for the test).
"""

from __future__ import annotations

import argparse
import math
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Job, Result, Results, is_child, last_json, memory

PEER, DENSE, TORCH = "llm-compressor SparseGPT", "dense", "torch.nn.utils.prune L1"
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude"},
    "wanda": {"criterion": "wanda", "scope": "row"},
    "magnitude, least squares": {"criterion": "magnitude", "repair": "least_squares"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "alps": {"criterion": "alps"},
    "sparsegpt, loss": {"criterion": "sparsegpt", "objective": "loss"},
    "alps, loss": {"criterion": "alps", "objective": "loss"},
    "balanced": {"preset": "balanced"},
    "best, no repair": {"preset": "best", "repair": None},
    "best": {"preset": "best"},
}


def main() -> None:
    """Measure what has not been measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("train", nargs="?", help="text to calibrate on, as --data takes it")
    parser.add_argument("test", nargs="?", help="text to score")
    parser.add_argument("--second", help="another text to score, of another kind")
    parser.add_argument("--stories", action="store_true", help="the model's own stories instead of texts")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=[*METHODS, TORCH])
    parser.add_argument("--amounts", nargs="+", default=["0.5", "0.6", "2:4"])
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--test-windows", type=int, help="test windows of each text; all by default")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch-size", type=int, default=1, help="windows at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer-python", help="interpreter of an environment with llm-compressor")
    parser.add_argument("--out", type=Path, default=Path("llm"), help="folder for the results")
    parser.add_argument("--table", action="store_true", help="only print what has been measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stories == bool(args.train and args.test):
        parser.error("name a training and a test text, or pass --stories")
    if is_child(args, measure):
        return
    results, jobs = Results(args.out), [job(args, DENSE, "")]
    for amount in args.amounts:
        methods = [name for name in args.methods if not (name == TORCH and ":" in amount)]  # torch has no N:M
        jobs += [job(args, name, amount) for name in [*([PEER] if args.peer_python else []), *methods]]
    if not args.table:
        results.measure(jobs, lambda job, result: f"{job['method']} {job['amount']}: {result['perplexity']}")
    print(table(args, results))


def job(args: argparse.Namespace, method: str, amount: str) -> Job:
    """What a row is of."""
    windows = {"windows": args.windows, "length": args.length, "test_windows": args.test_windows, "seed": args.seed}
    return {"method": method, "amount": amount, "batch_size": args.batch_size, **windows}


# --- in a process of its own ----------------------------------------------------------------------------


def measure(args: argparse.Namespace, job: Job) -> Result:
    """Prune and score: one row."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_prune import evaluate_perplexity, prune, token_windows

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    train, texts = read_texts(args, model, tokenizer)
    options = {"n": args.windows, "length": args.length, "batch_size": args.batch_size, "seed": args.seed}
    batches = token_windows(train, tokenizer, **options)
    method, amount = job["method"], job["amount"]
    result: Result = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if method == PEER:
        result |= prune_with_peer(args, model, batches, amount)
    elif method != DENSE:
        start = time.process_time()
        if method == TORCH:
            prune_with_torch(model, float(amount))
        else:
            wanted = {"granularity": amount} if ":" in amount else {"sparsity": float(amount)}
            prune(model, calibration=batches, **settings_of(method, amount), **wanted)
        result |= {"seconds": time.process_time() - start, "peak": memory("VmHWM")}
    scored = {"window": args.length, "limit": args.test_windows}
    scores = [evaluate_perplexity(model, tokenizer, text, **scored) for text in texts]
    return {
        **result,
        "perplexity": [score.perplexity for score in scores],
        "nll": [list(score.window_nll) for score in scores],
        "windows seen": sum(len(batch["input_ids"]) for batch in batches),
    }


def settings_of(method: str, amount: str) -> dict[str, Any]:
    """The settings of a method; N:M patterns have a scope of their own."""
    settings = dict(METHODS[method])
    if ":" in amount:
        settings.pop("scope", None)
    return settings


def read_texts(args: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[list[str], list[list[str]]]:
    """The text to calibrate on, and those to score."""
    from hf_prune.evaluation.tasks.language_modeling import LanguageModelingTask

    if args.stories:
        number = max(64, 2 * args.windows * args.length // 256)
        return tell_stories(model, tokenizer, number, args.seed), [tell_stories(model, tokenizer, 128, args.seed + 1)]
    second = [LanguageModelingTask(args.second).load("test")] if args.second else []
    return LanguageModelingTask(args.train).load("train"), [LanguageModelingTask(args.test).load("test"), *second]


def tell_stories(model: Any, tokenizer: Any, n: int, seed: int, length: int = 256) -> list[str]:
    """Texts that a model samples from its start token."""
    import torch

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
    stories: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return stories


def prune_with_torch(model: Any, sparsity: float) -> None:
    """torch.nn.utils.prune on the same Linears, layer by layer."""
    from torch.nn.utils import prune as torch_prune

    from hf_prune import PruningConfig
    from hf_prune.planning.make_plan import make_plan

    for planned in make_plan(model, PruningConfig(sparsity)).tensors:
        module = model.get_submodule(planned.target.module)
        torch_prune.l1_unstructured(module, "weight", sparsity)
        torch_prune.remove(module, "weight")


def prune_with_peer(args: argparse.Namespace, model: Any, batches: Any, amount: str) -> Result:
    """Have llm-compressor prune in its own environment, and take over its weights."""
    import torch
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        windows, weights = f"{folder}/windows.safetensors", f"{folder}/weights.safetensors"
        save_file({"input_ids": torch.cat([batch["input_ids"] for batch in batches])}, windows)
        script = str(Path(__file__).with_name("llm_peer.py"))
        command = [args.peer_python, script, args.model, windows, amount, weights]
        run = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
        with torch.no_grad():
            for name, weight in load_file(weights).items():
                model.get_parameter(name).copy_(weight)
    return last_json(run.stdout)


# --- the table ------------------------------------------------------------------------------------------


def table(args: argparse.Namespace, results: Results) -> str:
    """What has been measured, as Markdown."""
    dense = results.get(job(args, DENSE, ""))
    if dense is None:
        return "nothing has been measured yet"
    names = ["the model's own stories"] if args.stories else [Path(p).name for p in (args.test, args.second) if p]
    header = ["removed", "method", *(f"perplexity on {name}" for name in names), "increase", "CPU s", "peak, GB"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    lines.append(f"| – | dense | {' | '.join(f'{p:.2f}' for p in dense['perplexity'])} | | | |")
    for amount in args.amounts:
        reference = next(filter(None, (results.get(job(args, name, amount)) for name in (PEER, "sparsegpt"))), None)
        for method in [PEER, TORCH, *METHODS]:
            if (result := results.get(job(args, method, amount))) is None:
                continue
            cells = [
                f"{p:.2f} ({ratio_with_error(*nlls)})"
                for p, *nlls in zip(result["perplexity"], result["nll"], dense["nll"], strict=True)
            ]
            share = "" if reference is None else f"{increase(result, dense) / increase(reference, dense):.2f}"
            lines.append(
                f"| {amount} | {method} | {' | '.join(cells)} | {share} | {result['seconds']:.0f} | "
                f"{result['peak'] / 1e9:.2f} |"
            )
    windows = ", ".join(str(len(nll)) for nll in dense["nll"])
    return "\n".join(lines) + (
        f"\n\nCalibrated on {dense['windows seen']} windows of {args.length} tokens, seed {args.seed}, scored on "
        f"{windows} windows; in brackets, times the dense perplexity with its paired standard error; increase of "
        f"log-perplexity on the first text, times that of SparseGPT; threads: {dense['threads']}, torch "
        f"{dense['torch']}."
    )


def increase(result: Result, dense: Result) -> float:
    """Of log-perplexity, on the first text."""
    return math.log(result["perplexity"][0] / dense["perplexity"][0])


def ratio_with_error(nll: list[float], dense: list[float]) -> str:
    """The ratio of two perplexities, with its standard error over the windows."""
    changes = [a - b for a, b in zip(nll, dense, strict=True)]
    mean = sum(changes) / len(changes)
    ratio = math.exp(mean)
    if len(changes) < 2:
        return f"{ratio:.3g}"
    variance = sum((change - mean) ** 2 for change in changes) / (len(changes) - 1)
    return f"{ratio:.3g} ± {ratio * (variance / len(changes)) ** 0.5:.2g}"


if __name__ == "__main__":
    main()
