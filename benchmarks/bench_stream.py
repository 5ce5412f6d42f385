"""Memory of streaming: a checkpoint larger than the memory limit of the process that prunes it.

    python benchmarks/bench_stream.py                             # 3 GB of checkpoint, a limit of 1.5 GB, 7 GB of disk
    python benchmarks/bench_stream.py --layers 6 --limit 0.7 --runs sparsegpt     # slow: 40 s a block
    python benchmarks/bench_stream.py --layers 30 --hidden 1024 --ffn 2816 --vocab 32000 --limit 1.237 \
        --runs "magnitude;wanda;sparsegpt"                        # 440 million parameters, as 8 billion on 24 GB

It makes a sharded Llama with random weights in bfloat16 in a temporary folder, and prunes it in child processes. Each
child imports everything, prunes a tiny checkpoint so that every library is loaded, limits the memory that it may add
(RLIMIT_DATA: private memory, whether used or not), and starts. The peak is that of the resident memory (VmHWM)
less what it was before. Files are read, not mapped, so nothing of the checkpoint hides in the page cache. glibc keeps
freed memory of up to twice the largest tensor for later; MALLOC_MMAP_THRESHOLD_ makes it return that, so that the
numbers are what is held.

    python benchmarks/bench_stream.py --layers 16 --ffn 5632 --vocab 32000 --limit 1.5      # a billion parameters

"statistics" is what the criterion keeps of the widest input of a block: for wanda its mean squares; for sparsegpt its
Gram matrix in float32 (4 bytes) and the factor of its inverse, computed in float64 (8) and used in float32 (4). The
bound is the largest block and its statistics plus 10 %; it does not count what else is kept where gradients, dense
outputs or units are looked at. Finished blocks write their outputs to disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import torch

from hf_prune.utils.formatting import format_table

MB = 10**6
RUNS = {
    "magnitude, layer": {"criterion": "magnitude"},
    "magnitude, global": {"criterion": "magnitude", "scope": "global"},
    "wanda, row": {"criterion": "wanda", "scope": "row"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "sparsegpt by loss": {"criterion": "sparsegpt", "objective": "loss"},
    "alps by loss": {"criterion": "alps", "objective": "loss"},
    "fisher_diagonal": {"criterion": "fisher_diagonal"},
    "heads and neurons": {"granularity": ("head", "neuron"), "preset": "balanced", "sparsity": 0.2, "scope": "layer"},
    "layers": {"granularity": "layer", "preset": "balanced", "sparsity": 0.2},
}
IN_MEMORY = {
    "magnitude, in memory": {"criterion": "magnitude"},
    "sparsegpt, in memory": {"criterion": "sparsegpt"},
}


def make_checkpoint(folder: Path, layers: int, hidden: int, ffn: int, vocab: int, per_shard: int = 4) -> None:
    """Write a sharded checkpoint, a few blocks at a time."""
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, hidden // 128)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with init_empty_weights():
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    groups: dict[int, list[str]] = {}
    for name in shapes:
        number = int(name.split(".")[2]) // per_shard if ".layers." in name else layers // per_shard
        groups.setdefault(number, []).append(name)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, names in sorted(groups.items()):
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        noise = {n: torch.randn(shapes[n], generator=generator).mul_(0.02).bfloat16() for n in names}
        save_file(
            {n: torch.ones_like(t) if "norm" in n else t for n, t in noise.items()}, folder / file, {"format": "pt"}
        )
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def batches(vocab: int, texts: int, length: int, size: int = 4) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, vocab, (texts, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(size)]


def measure(args: argparse.Namespace, job: harness.Job) -> harness.Result:
    """Prune within the memory limit, and measure what that takes."""
    from transformers.utils import logging

    from hf_prune import PruningConfig, prune_stream
    from hf_prune.auto import load_native

    logging.disable_progress_bar()
    run, source, out = job["run"], job["source"], job["out"]
    config = PruningConfig(**{**RUNS, **IN_MEMORY}[run])
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder) / "tiny", 2, 256, 512, 64)
        for _ in range(2):
            calibration = batches(64, 4, args.length, 2)
            prune_stream(Path(folder) / "tiny", config, Path(folder) / "out", calibration=calibration)
        load_native(str(Path(folder) / "out"))
    resource.setrlimit(resource.RLIMIT_DATA, (harness.memory("VmData") + int(args.limit * 1e9),) * 2)
    before = harness.start_of_peak()
    start, cpu = time.perf_counter(), time.process_time()
    calibration = batches(args.vocab, args.texts, args.length, args.batch) if config.needs_data else None
    if run in IN_MEMORY:
        model = load_native(source).prune(config, calibration=calibration, cache_bytes=0)
        sparsity = model.sparsity_report().target_sparsity
        model.save_pretrained(out, max_shard_size="200MB")
    else:
        sparsity = prune_stream(source, config, out, calibration=calibration, cache_bytes=0).target_sparsity
    return {
        "peak": harness.memory("VmHWM") - before,
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "sparsity": sparsity,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5504)
    parser.add_argument("--vocab", type=int, default=16000)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4, help="texts that run together")
    parser.add_argument("--limit", type=float, default=1.5, help="GB beyond what the imports take")
    parser.add_argument("--runs", default="magnitude;wanda", help="names separated by semicolons, or how they start")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if harness.is_child(args, measure):
        return
    with tempfile.TemporaryDirectory(prefix="bench_stream-") as folder:
        source = Path(folder) / "source"
        make_checkpoint(source, args.layers, args.hidden, args.ffn, args.vocab)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        block = 2 * (4 * args.hidden**2 + 3 * args.hidden * args.ffn + 2 * args.hidden)
        block = max(block, 2 * args.vocab * args.hidden)
        width = max(args.hidden, args.ffn)
        statistics = {"wanda": 12 * width, "sparsegpt": 16 * width**2, "alps": 32 * width**2}
        print(
            f"checkpoint {size / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} files, limit {args.limit} GB"
        )
        rows = []
        for run in [*IN_MEMORY, *RUNS]:
            if not any(part.strip() and run.startswith(part.strip()) for part in args.runs.split(";")):
                continue
            out = Path(folder) / "out"
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
            job = {"run": run, "source": str(source), "out": str(out)}
            done = harness.run_child(job, stderr=subprocess.PIPE, env=environment)
            extra = statistics.get(re.split("[, ]", run)[0], 0)
            held = size if run in IN_MEMORY else block
            bound = 1.1 * (held + extra)
            row = [run, f"{held / MB:,.0f}", f"{extra / MB:,.0f}", f"{bound / MB:,.0f}"]
            if done.returncode == 0:
                result = harness.last_json(done.stdout)
                verdict = "within" if result["peak"] <= bound else "ABOVE"
                rows.append(
                    [
                        *row,
                        f"{result['peak'] / MB:,.0f}",
                        verdict,
                        f"{result['sparsity']:.4f}",
                        f"{result['seconds']:.0f}",
                        f"{result['cpu']:.0f}",
                    ]
                )
            else:
                last = next((x for x in reversed(done.stderr.splitlines()) if x.strip()), f"signal {-done.returncode}")
                why = "can't allocate memory" if "allocate memory" in done.stderr else last[:60]
                rows.append([run, "", "", "", "", f"fails: {why}", "", "", ""])
            print(rows[-1], file=sys.stderr)
            subprocess.run(["rm", "-rf", str(out)], check=True)
        heads = ["run", "weights MB", "statistics MB", "bound MB", "peak MB", "", "sparsity", "seconds", "CPU s"]
        print(format_table(heads, rows))


if __name__ == "__main__":
    main()
