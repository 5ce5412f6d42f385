"""Time and memory of pruning a DistilBERT-shaped model at 50 %, beside torch.nn.utils.prune and a floor.

The floor is the least that any magnitude pruning does: one ``abs`` pass and one ``masked_fill_`` pass over the
same weights. All methods take turns in one process on one thread; before each, the same dense weights are restored
(not timed). Peak memory is measured for each method in a process of its own.

    python benchmarks/bench_prune.py --rounds 7

With ``--layers``, it shows instead how the time grows with the number of layers: of chains of tiny Linears for cheap
steps, and with ``--blocks`` of Llamas with this many blocks for steps that run data or read files.

    python benchmarks/bench_prune.py --layers 500 1000 2000 --blocks 50 100 200
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import memory, start_of_peak
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import DistilBertConfig, DistilBertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_prune import MaskStore, compress_checkpoint, prune, prune_stream, shrink, sparsity_report
from hf_prune.checkpoint.files import MASK_FILE
from hf_prune.checkpoint.mask_file import load_masks, save_masks
from hf_prune.checkpoint.save import save_pruned
from hf_prune.utils.formatting import format_table

SPARSITY = 0.5


def build() -> nn.Module:
    """DistilBERT with random weights: 66,955,010 parameters, 43,058,688 of them in 38 Linears."""
    torch.manual_seed(0)
    return DistilBertForSequenceClassification(DistilBertConfig())


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def ours_layer(model: nn.Module) -> None:
    prune(model, SPARSITY)


def ours_global(model: nn.Module) -> None:
    prune(model, SPARSITY, scope="global")


def torch_layer(model: nn.Module) -> None:
    for module in linears(model):
        torch_prune.l1_unstructured(module, "weight", SPARSITY)
        torch_prune.remove(module, "weight")


def torch_global(model: nn.Module) -> None:
    pairs = [(module, "weight") for module in linears(model)]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=SPARSITY)
    for module, name in pairs:
        torch_prune.remove(module, name)


def floor(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in masks:
            parameter.detach().abs()
            parameter.data.masked_fill_(masks[name], 0)


METHODS: dict[str, Callable[[nn.Module], None]] = {
    "hf_prune layer": ours_layer,
    "torch.nn.utils.prune layer": torch_layer,
    "hf_prune global": ours_global,
    "torch.nn.utils.prune global": torch_global,
}


def zeros(model: nn.Module) -> torch.Tensor:
    return torch.cat([(module.weight == 0).flatten() for module in linears(model)])


def peak_memory(name: str, queue: multiprocessing.Queue[int]) -> None:
    """Put the growth of this process's resident memory at its peak, in bytes, into a queue."""
    torch.set_num_threads(1)
    model = build()
    METHODS[name](nn.Sequential(nn.Linear(8, 8)))  # import what is imported at the first use
    before = start_of_peak()
    METHODS[name](model)
    queue.put(memory("VmHWM") - before)


def measure(rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every method in every round, taking turns; the masks of peers are compared."""
    model = build()
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def reset() -> None:
        for name, parameter in model.named_parameters():
            parameter.data = dense[name].clone()
        model.__dict__.pop("_hf_prune_masks", None)

    prune(model, SPARSITY)
    store = MaskStore.of(model)
    assert store is not None
    masks = {name: ~mask for name, mask in store.masks.items()}
    methods = {"floor (abs + masked_fill_)": lambda model: floor(model, masks), **METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + 1):
        removed = {}
        for name, method in methods.items():
            reset()
            start = time.process_time()
            method(model)
            if turn > 0:  # the first round warms up
                seconds[name].append(time.process_time() - start)
            if turn == 0:
                removed[name] = zeros(model)
        for scope in ("layer", "global") if turn == 0 else ():
            same = torch.equal(removed[f"hf_prune {scope}"], removed[f"torch.nn.utils.prune {scope}"])
            print(f"masks of scope {scope}: {'equal' if same else 'DIFFERENT'}")
    return seconds


def growth(counts: list[int]) -> None:
    """Time per layer with this many tiny ones: constant, unless something visits all layers for each layer."""
    steps: dict[str, Callable[[nn.Module, list[dict[str, torch.Tensor]]], object]] = {
        "magnitude": lambda model, batches: prune(model, SPARSITY),
        "wanda, one pass": lambda model, batches: prune(
            model, SPARSITY, criterion="wanda", calibration_order="one_pass", calibration=batches
        ),
        "global": lambda model, batches: prune(model, SPARSITY + 0.1, scope="global"),
        "report": lambda model, batches: sparsity_report(model),
        "masks saved and loaded": lambda model, batches: _save_and_load(model),
    }
    rows = []
    for count in counts:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(count)))
        batches = [{"input": torch.randn(4, 8)} for _ in range(2)]
        row = [str(count)]
        for step in steps.values():
            start = time.perf_counter()
            step(model, batches)
            row.append(f"{1e3 * (time.perf_counter() - start) / count:.3f}")
        rows.append(row)
    print(format_table(["layers", *(f"{name}, ms each" for name in steps)], rows))


def growth_of_blocks(counts: list[int]) -> None:
    """CPU time per block of Llamas with this many tiny blocks, by method."""
    units = {"granularity": ("head", "neuron")}
    whole = {"granularity": ("head", "neuron", "layer"), "scope": "global"}
    steps = {
        "wanda": _pruning(criterion="wanda"),
        "sparsegpt": _pruning(criterion="sparsegpt"),
        "alps": _pruning(criterion="alps"),
        "taylor": _pruning(criterion="taylor"),
        "fisher": _pruning(criterion="fisher"),
        "repair": _pruning(criterion="magnitude", repair="least_squares"),
        "allocation owl": _pruning(criterion="wanda", allocation="owl"),
        "allocation fisher": _pruning(criterion="wanda", allocation="fisher"),
        "objective loss": _pruning(criterion="wanda", objective="loss", repair="least_squares"),
        "units, magnitude": _pruning(criterion="magnitude", **units),
        "units, fisher": _pruning(criterion="fisher", **units),
        "units, fisher, repair": _pruning(criterion="fisher", repair="least_squares", **units),
        "layers, fisher": _pruning(criterion="fisher", granularity="layer", scope="global"),
        "prune whole, shrink": lambda model, _: shrink(prune(model, SPARSITY, **whole)),
        "prune, report": lambda model, _: sparsity_report(prune(model, SPARSITY)).to_json(),
        "prune, save, compress": _save_and_compress,
        "stream": _streaming(criterion="magnitude"),
        "stream, wanda": _streaming(criterion="wanda", calibration=_tokens(labels=False)),
    }
    rows = []
    for name, step in steps.items():
        row = [name]
        for count in counts:
            torch.manual_seed(0)
            sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 48, "max_position_embeddings": 24}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
            model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=count, **sizes, **heads)).eval()
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                step(model, Path(folder))
                row.append(f"{1e3 * (time.process_time() - start) / count:.1f}")
        rows.append(row)
        print(*row, flush=True)
    print(format_table(["CPU ms for each block, of", *map(str, counts)], rows))


def _tokens(labels: bool = True) -> list[dict[str, torch.Tensor]]:
    ids = [torch.arange(12).view(2, 6) + i for i in range(2)]
    return [{"input_ids": row, "labels": row} if labels else {"input_ids": row} for row in ids]


def _pruning(**settings: Any) -> Callable[[nn.Module, Path], object]:
    return lambda model, _: prune(model, SPARSITY, calibration=_tokens(), **settings)


def _streaming(**settings: Any) -> Callable[[nn.Module, Path], object]:
    def stream(model: Any, folder: Path) -> object:
        model.save_pretrained(folder / "dense")
        return prune_stream(folder / "dense", SPARSITY, folder / "pruned", **settings)

    return stream


def _save_and_compress(model: Any, folder: Path) -> None:
    save_pruned(prune(model, SPARSITY), type(model), type(model).save_pretrained, folder / "dense")
    compress_checkpoint(folder / "dense", folder / "small")


def _save_and_load(model: nn.Module) -> None:
    store = MaskStore.of(model)
    assert store is not None
    with tempfile.TemporaryDirectory() as folder:
        save_masks(store, Path(folder) / MASK_FILE)
        load_masks(Path(folder) / MASK_FILE)


def main() -> None:
    """Measure and print, goals included, reached or not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="+", default=[])
    parser.add_argument("--blocks", type=int, nargs="+", default=[])
    arguments = parser.parse_args()
    rounds = arguments.rounds
    torch.set_num_threads(1)
    if arguments.layers or arguments.blocks:
        if arguments.layers:
            growth(arguments.layers)
        if arguments.blocks:
            growth_of_blocks(arguments.blocks)
        return
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, 1 thread")
    seconds = measure(rounds)

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

    base = "floor (abs + masked_fill_)"
    rows = [
        [name, f"{statistics.median(s):.3f}", f"{min(s):.3f} to {max(s):.3f}", f"{ratio(name, base):.2f}"]
        for name, s in seconds.items()
    ]
    print(format_table(["method", "CPU s (median)", "range", "times the floor"], rows))
    for scope, goal in (("layer", 8), ("global", 14)):
        faster = ratio(f"torch.nn.utils.prune {scope}", f"hf_prune {scope}")
        over = ratio(f"hf_prune {scope}", base)
        print(
            f"scope {scope}: {faster:.1f} times as fast as torch.nn.utils.prune "
            f"(goal {goal}: {verdict(faster >= goal)}), {over:.2f} times the floor (goal 1.40: {verdict(over <= 1.4)})"
        )

    if not Path("/proc/self/clear_refs").exists():
        print("peak memory: not measured, this system has no /proc/self/clear_refs")
        return
    model = build()
    weights = [module.weight for module in linears(model)]
    largest = max(w.numel() * w.element_size() for w in weights)
    allowed = 1.25 * largest + sum(w.numel() for w in weights)
    context = multiprocessing.get_context("spawn")
    for name in METHODS:
        queue: multiprocessing.Queue[int] = context.Queue()
        process = context.Process(target=peak_memory, args=(name, queue))
        process.start()
        peak = queue.get()
        process.join()
        goal = f" (goal {allowed / 1e6:.1f} MB: {verdict(peak <= allowed)})" if name.startswith("hf_prune") else ""
        print(f"peak extra memory, {name}: {peak / 1e6:.1f} MB{goal}")


def verdict(reached: bool) -> str:
    return "reached" if reached else "MISSED"


if __name__ == "__main__":
    main()
