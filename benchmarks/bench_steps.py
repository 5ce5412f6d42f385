"""Where the time goes when a Llama of random weights is pruned by a calibrated criterion, step by step.

    python benchmarks/bench_steps.py                          # alps, 50 %, 1,024 wide, two blocks, one thread
    python benchmarks/bench_steps.py --criterion sparsegpt

The times are CPU seconds of the process that each step takes itself, without the steps that it calls.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from hf_prune import prune
from hf_prune.calibration.accumulators import InputAccumulator
from hf_prune.criteria import alps, sparsegpt
from hf_prune.pruning import compute_masks
from hf_prune.pruning.selector import Selector
from hf_prune.utils.formatting import format_table

REST = "the rest: passes through the model, writing"
STEPS = (  # owner, name, what it is
    (InputAccumulator, "add", "products of the inputs"),
    (alps.ALPS, "prune_weight", "alps: the rest"),
    (alps, "_support", "alps: products and sums of the iterations"),
    (alps, "_ridge_inverse", "alps: inverses"),
    (alps, "least_squares", "alps: conjugate gradients"),
    (sparsegpt.SparseGPT, "prune_weight", "sparsegpt"),
    (Selector, "__call__", "selections"),
    (Selector, "columns", "selections"),
    (compute_masks, "refit", "repair by least squares"),
)


class Clock:
    """CPU seconds and calls by step, of the innermost step that is running."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._running = [REST]
        self._since = time.process_time()

    def book(self) -> None:
        """Count what came last for the step that is running."""
        now = time.process_time()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def wrapped(self, function: Callable[..., Any], step: str) -> Callable[..., Any]:
        """The same function, whose time counts for a step."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.book()
            self._running.append(step)
            self.calls[step] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.book()
                self._running.pop()

        return timed


def main() -> None:
    """Prune once, and print the table."""
    from transformers import LlamaConfig, LlamaForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criterion", default="alps")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--windows", type=int, default=16, help="of 512 random tokens")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # embeddings of sizes that differ, as in real models: their inputs are not all alike
        model.model.embed_tokens.weight.mul_(torch.randn(args.hidden).exp())
    windows = [{"input_ids": torch.randint(4096, (1, 512))} for _ in range(args.windows)]
    clock = Clock()
    for owner, name, step in STEPS:
        if hasattr(owner, name):
            setattr(owner, name, clock.wrapped(getattr(owner, name), step))
    prune(model, args.sparsity, criterion=args.criterion, calibration=windows, progress=False)
    clock.book()
    total = sum(clock.seconds.values())
    rows = [
        [step, f"{clock.calls[step] or '':}", f"{seconds:.1f}", f"{100 * seconds / total:.0f} %"]
        for step, seconds in clock.seconds.most_common()
    ]
    rows.append(["all", "", f"{total:.1f}", ""])
    weights = sum(p.numel() for p in model.model.layers.parameters()) / 1e6
    print(
        f"{args.criterion}, {100 * args.sparsity:g} %, {args.layers} blocks {args.hidden} wide ({weights:.0f} million "
        f"weights), {args.windows} windows of 512 tokens, {args.threads} threads, torch {torch.__version__}\n"
    )
    print(format_table(["step", "calls", "CPU s", "share"], rows))


if __name__ == "__main__":
    main()
