"""Size of compressed checkpoints, and the cost of saving and loading them, beside alternatives.

A classifier with random normal weights of BERT's spread (or ``--model``, a checkpoint) is pruned by magnitude in all
its Linears, in turn at each sparsity and in each dtype. Bytes are counted for each target weight and for the file:

- bitmask: one bit for each target weight, and the remaining values as they are;
- zstd -19: the dense file with its zeros, compressed as a whole;
- bound: entropy of the positions (of the pattern for N:M) and, order 0, of the upper 16 bits of the remaining
  values; their lower bits are noise. It is counted tensor by tensor, and a little too low for tensors with few values.

Loading is ``from_pretrained`` from a warm cache until every page of the weights is there, dense and compressed in turns
in one process on one thread; the peak is the growth of a fresh process's own memory (pages of a mapped file are not
counted), and decoding is unpacking alone.

    python benchmarks/bench_checkpoint.py --rounds 7
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zstandard
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers.utils import logging

from hf_prune import prunable
from hf_prune.checkpoint.files import file_paths
from hf_prune.checkpoint.packed.files import PackedFiles
from hf_prune.checkpoint.packed.format import SUFFIX
from hf_prune.checkpoint.packed.unpack import unpack
from hf_prune.conversion.compression import compress_checkpoint
from hf_prune.conversion.decompression import decompress_checkpoint
from hf_prune.kernels.sparse.build import load_kernel
from hf_prune.utils.formatting import format_table

SETTINGS = ("0", "0.5", "0.8", "0.9", "0.95", "2:4")
DTYPES = ("float32", "bfloat16", "float16")


def build(source: str | None) -> BertForSequenceClassification:
    """Six layers of 384, the shape of MiniLM-L6, unless a checkpoint is given."""
    if source is not None:
        return AutoModelForSequenceClassification.from_pretrained(source)
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = BertForSequenceClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.04)
    return model


def save_pruned(source: str | None, setting: str, dtype: str, folder: Path) -> set[str]:
    """Prune, save dense, and return the names of the target weights."""
    model = prunable(build(source))
    if setting != "0":
        model.prune(**({"granularity": setting} if ":" in setting else {"sparsity": float(setting)}))
    else:
        model.prune(0.0)
    names = set(model.masks)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return names


def entropy(counts: np.ndarray) -> float:
    """Bits per symbol, from how often each occurs."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def bound(tensor: Tensor, mask: Tensor, setting: str) -> float:
    """The bound in bytes, see the module's docstring."""
    values = tensor[mask]
    kept, total = values.numel(), tensor.numel()
    if ":" in setting:
        n, m = map(int, setting.split(":"))
        positions = total / m * math.log2(math.comb(m, n))
    else:
        positions = total * entropy(np.array([kept, total - kept]))
    size = tensor.element_size()
    upper = values.contiguous().view(torch.uint8).numpy().view("<u2")[size // 2 - 1 :: size // 2]
    return (positions + kept * (entropy(np.bincount(upper)) + 8 * size - 16)) / 8


def sizes(dense: Path, small: Path, raw: Path, names: set[str], setting: str, slow: bool) -> list[str]:
    """One line of the table."""
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    tensors = {name: p.detach() for name, p in model.named_parameters() if name in names}
    masks = PackedFiles(file_paths(small)[0]).masks()
    weights = sum(tensor.numel() for tensor in tensors.values())
    kept = sum(int(masks[name].sum()) * tensor.element_size() for name, tensor in tensors.items())

    def packed(folder: Path) -> int:
        entries = PackedFiles(file_paths(folder)[0]).shards.entries
        return sum(entries[name + SUFFIX].size for name in names)

    least = sum(bound(tensor, masks[name], setting) for name, tensor in tensors.items())
    size = next(iter(tensors.values())).element_size()
    whole = [sum(path.stat().st_size for path in file_paths(folder)[0]) for folder in (dense, raw, small)]
    data = b"".join(path.read_bytes() for path in file_paths(dense)[0])
    recompressed = len(zstandard.ZstdCompressor(level=19).compress(data)) / 1e6 if slow else math.nan
    per_weight = [float(size), weights / 8 / weights + kept / weights, packed(raw) / weights, packed(small) / weights]
    return [
        *(f"{value:.4f}" for value in (*per_weight, least / weights)),
        f"{size / per_weight[3]:.1f}×",
        *(f"{value / 1e6:.1f}" for value in whole),
        "–" if math.isnan(recompressed) else f"{recompressed:.1f}",
    ]


def load(folder: Path) -> None:
    """Load a checkpoint and touch every page of it: transformers maps dense files, which are read when used."""
    for parameter in AutoModelForSequenceClassification.from_pretrained(folder).parameters():
        parameter.detach().view(-1).view(torch.uint8).numpy()[::4096].sum()


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, float], str]:
    """Median seconds of each call, after one round that is not counted, and how zstd compares with dense in each round.

    Returns:
        Seconds by call, and the median over rounds of load zstd / load dense: in time, and in that of the processor,
        all threads together, in which other processes on the machine do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            begin, begin_processor = time.perf_counter(), time.process_time()
            call()
            if number:
                times[name].append(time.perf_counter() - begin)
                processor[name].append(time.process_time() - begin_processor)
    ratios = [
        statistics.median(small / dense for small, dense in zip(of["load zstd"], of["load dense"], strict=True))
        for of in (times, processor)
    ]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians, ", ".join(f"{ratio:.1f}×" for ratio in ratios)


PEAK = """
import sys, torch, hf_prune, hf_prune.checkpoint.packed.files, hf_prune.checkpoint.packed.unpack
from harness import memory, start_of_peak
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification
torch.set_num_threads(1)
AutoModelForSequenceClassification.from_pretrained(sys.argv[2])
start_of_peak()
before = memory("RssAnon")
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
print(memory("VmHWM") - memory("RssFile") - before)
"""


def peak(folder: Path, small: Path) -> float:
    """MB by which the memory of a process grows at most while it loads a checkpoint."""
    command = [sys.executable, "-c", PEAK, str(folder), str(small)]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a classifier, in place of random weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--compiled", action="store_true", help="unpack with the compiled kernel, built if need be")
    parser.add_argument("--no-zstd19", action="store_true", help="leave out the slow column")
    parser.add_argument("--json", type=Path, help="where to put the results as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.compiled:
        load_kernel()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
    size_rows, time_rows = [], []
    with tempfile.TemporaryDirectory() as root:
        for dtype in arguments.dtypes.split(","):
            for setting in arguments.settings.split(","):
                folder = Path(root) / f"{dtype}-{setting.replace(':', '-')}"
                dense, small, raw = (folder / name for name in ("dense", "small", "raw"))
                names = save_pruned(arguments.model, setting, dtype, dense)
                compress_checkpoint(dense, small)
                compress_checkpoint(dense, raw, codec="none")
                row = sizes(dense, small, raw, names, setting, not arguments.no_zstd19)
                size_rows.append([dtype, setting, *row])
                files = PackedFiles(file_paths(small)[0])
                packed = {name: files.data(name) for name in names}
                model = AutoModelForSequenceClassification.from_pretrained(dense)
                dense_bytes = sum(p.nbytes for name, p in model.named_parameters() if name in names)
                calls: dict[str, Callable[[], object]] = {
                    "load dense": lambda dense=dense: load(dense),
                    "load zstd": lambda small=small: load(small),
                    "load raw": lambda raw=raw: load(raw),
                    "save dense": lambda model=model, out=folder / "a": model.save_pretrained(out),
                    "compress": lambda dense=dense, out=folder / "b": compress_checkpoint(dense, out),
                    "decompress": lambda small=small, out=folder / "c": decompress_checkpoint(small, out),
                    "decode": lambda packed=packed: [unpack(data) for data in packed.values()],
                }
                seconds, compared = in_turns(calls, arguments.rounds)
                speed = dense_bytes / seconds.pop("decode") / 1e9
                peaks = [f"{peak(path, small):.0f}" for path in (dense, small)]
                times = [f"{1000 * value:.0f}" for value in seconds.values()]
                time_rows.append([dtype, setting, *times, compared, f"{speed:.2f}", *peaks])
    header = ["dtype", "pruned", "dense", "bitmask", "raw", "zstd", "bound", "smaller"]
    header += ["dense MB", "raw MB", "zstd MB", "zstd -19 MB"]
    print("\nBytes for each target weight, and MB of the file\n")
    print(format_table(header, size_rows, left=2))
    header_2 = ["dtype", "pruned", "load dense", "load zstd", "load raw", "save dense", "compress", "decompress"]
    header_2 += ["zstd / dense: time, processor", "decode GB/s", "peak dense MB", "peak zstd MB"]
    print("\nMilliseconds (medians), decoding of the target weights alone, and peak memory of loading\n")
    print(format_table(header_2, time_rows, left=2))
    if arguments.json is not None:
        values = {"command": sys.argv, "cores": os.cpu_count(), "sizes": [header, *size_rows]}
        arguments.json.write_text(json.dumps({**values, "times": [header_2, *time_rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
