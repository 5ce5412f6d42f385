"""Time the kernels on the layers of a model, and choose the fastest for every number of tokens."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_prune.inference.acceleration.kernels import Kernel, candidates, make_kernel
from hf_prune.inference.timing import SHORTEST, speedup, time_together

TOKENS = (1, 4, 16, 64, 256)  # that are timed besides those of the workload
_ROUNDS = 11
_SECONDS = 1.0  # for the kernels of one layer and one number of tokens
_HOPELESS = 4.0  # times the fastest: a kernel that is so slow in a first run is not timed again


@dataclass(frozen=True)
class Choice:
    """The kernel for one range of token counts.

    Args:
        tokens: The number that was timed.
        kernel: The name of the kernel.
        dense_seconds: Median time of torch's default.
        seconds: Median time of the kernel.
        ratio: How many times as fast it is, the median over rounds; 1 for the default.
    """

    tokens: int
    kernel: str
    dense_seconds: float
    seconds: float
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


def choose(weight: Tensor, bias: Tensor | None, tokens: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[Choice]:
    """Time the kernels of one layer in turns; another than torch's default is chosen where it is faster beyond noise.

    Of the sparse kernel one layout is chosen for all numbers of tokens, so that the weights are kept once.

    Args:
        weight: (out, in) on the CPU.
        bias: (out,) or None.
        tokens: The numbers of tokens to time.
        dtypes: Precisions that are allowed besides the weight's own.

    Returns:
        A choice for each number of tokens, in rising order.
    """
    names = candidates(weight, dtypes)
    if len(names) == 1:
        return [Choice(min(tokens), "dense", 0.0, 0.0, 1.0)]
    kernels = {name: make_kernel(name, weight) for name in names}
    times = {count: _times(kernels, weight, bias, count) for count in sorted(set(tokens))}
    kernels = {name: kernels[name] for name in _one_layout(list(kernels), times)}
    choices = []
    for count, of_count in times.items():
        dense = of_count["dense"]
        best, ratio = "dense", 1.0
        for name in sorted(kernels.keys() & of_count.keys() - {"dense"}):
            gain = speedup(dense, of_count[name])
            if gain.low > 1 and gain.value > ratio:
                best, ratio = name, gain.value
        medians = statistics.median(dense), statistics.median(of_count[best])
        choices.append(Choice(count, best, *medians, ratio))
    return choices


def limits(tokens: Sequence[int]) -> tuple[int, ...]:
    """Where one range of token counts ends and the next begins: halfway between two that were timed, as a ratio."""
    return tuple(int((a * b) ** 0.5) for a, b in itertools.pairwise(tokens))


def _times(kernels: dict[str, Kernel], weight: Tensor, bias: Tensor | None, count: int) -> dict[str, tuple[float, ...]]:
    """Seconds of each kernel in each round; of kernels that are far from the fastest there are none."""
    x = torch.randn(count, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    runs = {name: partial(kernel, x, weight, bias) for name, kernel in kernels.items()}
    with torch.inference_mode():
        first = time_together(runs, rounds=2, warmup=1)
        fastest = min(min(timings.wall) for timings in first.values())
        close = {n: run for n, run in runs.items() if n == "dense" or min(first[n].wall) < _HOPELESS * fastest}
        slowest = max(SHORTEST, *(min(first[name].wall) for name in close))
        rounds = max(7, min(_ROUNDS, int(_SECONDS / (slowest * len(close)))))
        return {name: timings.wall for name, timings in time_together(close, rounds=rounds, warmup=1).items()}


def _one_layout(names: Sequence[str], times: dict[int, dict[str, tuple[float, ...]]]) -> list[str]:
    """The kernels without those that are another layout of a better one, on the whole."""
    families: dict[str, list[str]] = {}
    for name in names:
        kind, _, rest = name.partition(":")
        families.setdefault(f"{kind}{rest.partition(':')[1]}{rest.partition(':')[2]}", []).append(name)

    def cost(name: str) -> float:
        total = 1.0
        for of_count in times.values():
            dense = statistics.median(of_count["dense"])
            total *= min(1.0, statistics.median(of_count[name]) / dense) if name in of_count else 1.0
        return total

    return [name for names in families.values() for name in ([min(names, key=cost)] if len(names) > 1 else names)]
