"""Memory of gradients of a language model with a large vocabulary: losses chunk by chunk, and from all logits at once.

    python benchmarks/bench_gradients.py                      # one window of 2,048 tokens, a vocabulary of 128,256

It makes a small Llama with random weights and takes its gradients in child processes. The peak is that of the resident
memory (VmHWM) less what it was once the model was made.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import harness
import torch

from hf_prune.utils.formatting import format_table

RUNS = ("taylor", "fisher diagonal", "objective 'loss'", "heads and neurons")


def measure(args: argparse.Namespace, job: harness.Job) -> harness.Result:
    """Take gradients once, and measure what that takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_prune.architectures.find_unit_groups import find_unit_groups
    from hf_prune.calibration.gradients import mean_gradients, squared_gradients
    from hf_prune.calibration.input_reader import InputReader
    from hf_prune.calibration.output_head import HeadFinder
    from hf_prune.calibration.sensitivity import measure_sensitivity
    from hf_prune.planning.make_plan import make_plan
    from hf_prune.planning.plan import targets_of
    from hf_prune.planning.resolve import resolve_config
    from hf_prune.structured.gate_statistics import gate_statistics

    torch.manual_seed(0)
    heads = args.hidden // 64
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    targets = targets_of(make_plan(model, resolve_config(0.5, {"criterion": "magnitude"})))
    names = [target.name for target in targets]

    def take(length: int) -> None:
        ids = torch.randint(0, args.vocab, (args.windows, length), generator=torch.Generator().manual_seed(1))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if job["run"] == "taylor":
            mean_gradients(model, names, [{**batch, "labels": ids}], frozenset({"absolute_gradient"}))
        elif job["run"] == "fisher diagonal":
            squared_gradients(model, names, [batch])
        elif job["run"] == "objective 'loss'":
            with InputReader(model, targets, [batch]) as reader:
                reader.order()
                measure_sensitivity(reader, 0)
        else:
            gate_statistics(model, find_unit_groups(model), [batch])

    take(8)  # loads every library
    if not job["chunks"]:
        HeadFinder.__call__ = lambda *_: None  # type: ignore[method-assign]
    before = harness.start_of_peak()
    start = time.process_time()
    take(args.length)
    return {"peak": harness.memory("VmHWM") - before, "seconds": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--windows", type=int, default=1, help="of a batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if harness.is_child(args, measure):
        return
    rows = []
    for run in RUNS:
        cells = []
        for chunks in (True, False):
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
            done = harness.run_child({"run": run, "chunks": chunks}, stderr=subprocess.PIPE, env=environment)
            if done.returncode:
                last = next((x for x in reversed(done.stderr.splitlines()) if x.strip()), f"{-done.returncode}")
                cells += [last[:60], ""]
                continue
            result = harness.last_json(done.stdout)
            cells += [f"{result['peak'] / 10**6:,.0f}", f"{result['seconds']:.1f}"]
        rows.append([run, *cells])
        print(rows[-1], file=sys.stderr, flush=True)
    logits = 4 * args.windows * args.length * args.vocab
    print(f"the logits of a batch in float32: {logits / 10**6:,.0f} MB")
    print(format_table(["gradients", "chunks MB", "CPU s", "whole MB", "CPU s"], rows))


if __name__ == "__main__":
    main()
