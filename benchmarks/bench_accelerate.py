"""Is it faster now? Sparsity against measured speed on this CPU, of one layer and of a whole model.

Layer: a Linear of 768 inputs and 3,072 outputs with random zeros; the sparse kernel (its best format), torch's CSR
matrices as ``(W @ Xᵀ)ᵀ``, and the dense product in torch's default and in oneDNN. Model: DistilBERT's shape with random
weights, pruned by magnitude; plain (in torch's default, and in oneDNN through ``set_float32_matmul_precision``),
accelerated, with CSR matrices in all of its layers, and with ``--runtimes`` dense in ONNX Runtime and OpenVINO.
Generation: a token of SmolLM2-135M's shape behind 64 others in the cache, in float32 and in bfloat16.

Everything of one row is timed in turns, and speed-ups are medians of the ratios within a round, with a 95 % interval,
against the better of the two dense baselines.

    python benchmarks/bench_accelerate.py --threads 1 --plot acceleration.png
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_prune import ExportedModel, accelerate, export_model, prune
from hf_prune.inference.acceleration.dense_kernels import Dense, OneDNN
from hf_prune.inference.acceleration.kernel import Kernel
from hf_prune.inference.acceleration.layers import Ranges, switch_on
from hf_prune.inference.acceleration.machine import this_machine
from hf_prune.inference.acceleration.sparse_kernels import Csr, Sparse, formats_for
from hf_prune.inference.timing import Ratio, speedup, time_together
from hf_prune.utils.formatting import format_table
from hf_prune.utils.forward import cache_argument

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
INPUTS, OUTPUTS = 768, 3072


@contextmanager
def onednn() -> Iterator[None]:
    """Inside, torch multiplies float32 matrices with oneDNN."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def measure(runs: dict[str, Callable[[], object]], dense: Sequence[str], seconds: float) -> dict[str, Any]:
    """Time functions in turns; the ratios are against the fastest of the dense ones."""
    with torch.inference_mode():
        timings = time_together(runs, rounds=200, warmup=2, seconds=seconds)
    medians = {name: statistics.median(times.wall) for name, times in timings.items()}
    base = min(dense, key=medians.__getitem__)
    ratios = {name: speedup(timings[base].wall, times.wall) for name, times in timings.items()}
    return {"base": base, "seconds": medians, "ratios": {name: list(vars(r).values()) for name, r in ratios.items()}}


# --- one layer -------------------------------------------------------------------------------------------------


def layer(tokens: int, sparsity: float, seconds: float) -> dict[str, Any]:
    """One Linear with a bias on some tokens."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    weight *= torch.rand(OUTPUTS, INPUTS, generator=generator) >= sparsity
    bias, x = torch.randn(OUTPUTS, generator=generator), torch.randn(tokens, INPUTS, generator=generator)
    kernels: list[Kernel] = [Dense(), OneDNN(), Csr(weight), *(Sparse(weight, name) for name in formats_for(weight))]
    runs = {kernel.name: partial(kernel, x, weight, bias) for kernel in kernels}
    return measure(runs, ("dense", "onednn"), seconds)


# --- a whole model ---------------------------------------------------------------------------------------------


def model(tokens: int, sparsity: float, seconds: float, runtimes: bool) -> dict[str, Any]:
    """DistilBERT's shape on one text."""
    torch.manual_seed(0)
    plain = DistilBertForSequenceClassification(DistilBertConfig()).eval()
    prune(plain, sparsity)
    inputs = {"input_ids": torch.randint(5, 30_000, (1, tokens)), "attention_mask": torch.ones(1, tokens).long()}
    faster, csr = copy.deepcopy(plain), copy.deepcopy(plain)
    report = accelerate(faster, inputs)
    for module in csr.modules():
        if type(module) is nn.Linear:
            switch_on(module, Ranges((), (Csr(module.weight),)))
    runs: dict[str, Callable[[], object]] = {
        "dense": partial(plain, **inputs),
        "onednn": partial(in_onednn, plain, inputs),
        "accelerated": partial(faster, **inputs),
        "csr": partial(csr, **inputs),
    }
    with tempfile.TemporaryDirectory() as folder:
        if runtimes:
            for suffix in ("onnx", "xml"):
                path = Path(folder) / f"model.{suffix}"
                export_model(plain, path)
                runs[suffix] = partial(ExportedModel(path, torch.get_num_threads()), **inputs)
        found = measure(runs, ("dense", "onednn"), seconds)
    return {**found, "bytes": [report.bytes_before, report.bytes_after], "difference": report.difference}


def in_onednn(plain: Callable[..., object], inputs: dict[str, Any]) -> None:
    with onednn():
        plain(**inputs)


# --- generation ------------------------------------------------------------------------------------------------


def generation(sparsity: float, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """One token of SmolLM2-135M's shape, with 64 in the cache."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    plain = LlamaForCausalLM(config).eval()
    prune(plain, sparsity)
    plain.to(dtype)
    token = torch.tensor([[7]])
    faster = copy.deepcopy(plain)
    report = accelerate(faster, {"input_ids": token, "use_cache": False}, tolerance=1e-2)

    def decoding(model: nn.Module) -> Callable[[], object]:
        cache, name = DynamicCache(config=config), cache_argument(model)
        with torch.inference_mode():
            model(torch.arange(64).view(1, 64), **{name: cache})

        def run() -> None:
            model(token, **{name: cache})
            cache.crop(-1)

        return run

    runs: dict[str, Callable[[], object]] = {"dense": decoding(plain), "accelerated": decoding(faster)}
    if dtype == torch.float32:
        runs["onednn"] = partial(in_onednn, decoding(plain), {})
    found = measure(runs, [name for name in ("dense", "onednn") if name in runs], seconds)
    kernels = sorted({kind.choices[0].kernel for kind in report.kinds})
    return {**found, "kernels": kernels, "bytes": [report.bytes_before, report.bytes_after]}


# --- output ----------------------------------------------------------------------------------------------------


def table(results: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    rows = []
    for result in results:
        found, cells = result["found"], []
        for name in names:
            if name not in found["seconds"]:
                cells.append("")
                continue
            ratio = Ratio(*found["ratios"][name])
            interval = f" ({ratio.low:.2f} to {ratio.high:.2f})" if name in ("accelerated", "sparse") else ""
            cells.append(f"{1e6 * found['seconds'][name]:,.0f} {ratio.value:.2f}×{interval}")
        rows.append([f"{result['tokens']}", f"{100 * result['sparsity']:.0f} %", found["base"], *cells])
    return format_table(["tokens", "zeros", "baseline", *names], rows)


def best_format(found: dict[str, Any]) -> dict[str, Any]:
    """The sparse kernel once, in the format that is fastest."""
    formats = [name for name in found["seconds"] if name not in ("dense", "onednn", "csr")]
    best = min(formats, key=found["seconds"].__getitem__)
    return {
        **found,
        "seconds": {**found["seconds"], "sparse": found["seconds"][best]},
        "ratios": {**found["ratios"], "sparse": found["ratios"][best]},
    }


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up of the whole model against its zeros, a line for each number of tokens, for light and dark pages."""
    from hf_prune.utils.figures import GREY, MARKERS, PALETTE, figure, save_pair

    drawn, axes = figure(8.0, 4.6)
    axes.axhline(1, color=GREY, linewidth=1, linestyle=":")
    lines: dict[int, list[tuple[float, float, float, float]]] = {}
    for result in results:
        ratio = result["found"]["ratios"]["accelerated"]
        lines.setdefault(result["tokens"], []).append((100 * result["sparsity"], *ratio[:3]))
    for points, color, marker in zip(lines.values(), PALETTE, MARKERS, strict=False):
        x, value, low, high = (list(each) for each in zip(*points, strict=True))
        below, above = ([abs(a - b) for a, b in zip(value, end, strict=True)] for end in (low, high))
        axes.errorbar(x, value, [below, above], color=color, marker=marker, markersize=5, linewidth=2, capsize=2)
    ends = {f"{tokens} token{'s' * (tokens > 1)}": points[-1][1] for tokens, points in lines.items()}
    harness.name_lines(axes, max(points[-1][0] for points in lines.values()), {"dense": 1.0, **ends})
    axes.set(xlabel="zeros in every linear layer (%)", ylabel="times as fast as the better dense model")
    save_pair(drawn, path)
    print(f"Drawn: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layer-tokens", type=int, nargs="*", default=[1, 32, 128])
    parser.add_argument("--model-tokens", type=int, nargs="*", default=[1, 32, 128])
    parser.add_argument("--generation", type=float, nargs="*", default=[0.8, 0.9], help="sparsities")
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row")
    parser.add_argument("--runtimes", action="store_true", help="ONNX Runtime and OpenVINO beside them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(", ".join(f"{key} {value}" for key, value in this_machine().items()))
    layers = [
        {"tokens": tokens, "sparsity": sparsity, "found": best_format(layer(tokens, sparsity, args.seconds / 2))}
        for tokens in args.layer_tokens
        for sparsity in args.sparsity
    ]
    print(f"\nLinear {INPUTS}→{OUTPUTS}, microseconds and speed-up against the better dense product:")
    print(table(layers, ("dense", "onednn", "csr", "sparse")), flush=True)
    models = [
        {"tokens": tokens, "sparsity": sparsity, "found": model(tokens, sparsity, args.seconds, args.runtimes)}
        for tokens in args.model_tokens
        for sparsity in args.sparsity
    ]
    print("\nDistilBERT's shape, batch 1, microseconds and speed-up against the better dense model:")
    print(table(models, ("dense", "onednn", "csr", "accelerated", *(("onnx", "xml") if args.runtimes else ()))))
    texts = [
        {"tokens": str(dtype).removeprefix("torch."), "sparsity": s, "found": generation(s, dtype, args.seconds)}
        for dtype in (torch.float32, torch.bfloat16)
        for s in args.generation
    ]
    print("\nSmolLM2-135M's shape, one token behind 64, microseconds and speed-up against the better dense model:")
    print(table(texts, ("dense", "onednn", "accelerated")))
    if args.json:
        values = {"machine": this_machine(), "layers": layers, "models": models, "generation": texts}
        args.json.write_text(json.dumps(values, indent=2))
    if args.plot and models:
        draw(models, args.plot)


if __name__ == "__main__":
    main()
