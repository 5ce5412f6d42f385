"""Time the kernels on the layers of a model, and choose the fastest for every number of tokens."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_prune.inference.acceleration.dense_kernels import Dense
from hf_prune.inference.acceleration.kernel import Kernel
from hf_prune.inference.acceleration.kernels import candidates, make_kernel
from hf_prune.inference.acceleration.layers import Ranges
from hf_prune.inference.acceleration.observe import share_of_largest
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


def choose(
    weight: Tensor, bias: Tensor | None, tokens: Sequence[int], precisions: Sequence[str], tolerance: float
) -> list[Choice]:
    """Time the kernels of one layer in turns; another than torch's default is chosen where it is faster beyond noise.

    One of those that hold the weight in a format of their own is chosen for all numbers of tokens, so that it is kept
    once. Others join it where they are faster than what is there, beyond noise, and all take less memory than the dense
    weight.

    Args:
        weight: (out, in) on the CPU.
        bias: (out,) or None.
        tokens: The numbers of tokens to time.
        precisions: Those that are allowed besides the weight's own.
        tolerance: Kernels whose output differs by more, as a share of the largest output, are left out.

    Returns:
        A choice for each number of tokens, in rising order.
    """
    names = candidates(weight, precisions)
    if len(names) == 1:
        return [Choice(min(tokens), "dense", 0.0, 0.0, 1.0)]
    kernels = {name: make_kernel(name, weight) for name in names}
    times = {count: _times(kernels, weight, bias, count, tolerance) for count in sorted(set(tokens))}
    names = _formats(kernels, times, weight)
    choices = []
    for count, of_count in times.items():
        best, ratio = _best(of_count, names)
        medians = statistics.median(of_count["dense"]), statistics.median(of_count[best])
        choices.append(Choice(count, best, *medians, ratio))
    return choices


def _best(of_count: dict[str, tuple[float, ...]], names: Sequence[str]) -> tuple[str, float]:
    """The fastest of some kernels and how many times as fast as torch's default it is."""
    best, ratio = "dense", 1.0
    for name in sorted({*names} & of_count.keys() - {"dense"}):
        gain = speedup(of_count["dense"], of_count[name])
        if gain.low > 1 and gain.value > ratio:
            best, ratio = name, gain.value
    return best, ratio


def _formats(kernels: dict[str, Kernel], times: dict[int, dict[str, tuple[float, ...]]], weight: Tensor) -> list[str]:
    """The kernels that read the dense weight, and of the others those whose formats are worth their memory."""
    names = [name for name, kernel in kernels.items() if kernel.nbytes == 0]
    others = [name for name in kernels if name not in names]

    def used(allowed: list[str]) -> dict[int, str]:
        return {count: _best(of_count, allowed)[0] for count, of_count in times.items()}

    def cost(name: str) -> float:
        best = used([*names, name])
        return math.prod(statistics.median(times[n][best[n]]) / statistics.median(times[n]["dense"]) for n in times)

    def is_worth_it(name: str) -> bool:
        before, after = used(names), used([*names, name])
        changed = [n for n in times if after[n] == name]
        if not any(speedup(times[n][before[n]], times[n][name]).low > 1 for n in changed):
            return False
        return Ranges((), tuple(kernels[one] for one in after.values())).bytes_with(weight) < weight.nbytes

    is_first = True
    while others:
        best = min(others, key=cost)
        others.remove(best)
        if is_first or is_worth_it(best):
            names.append(best)
        is_first = False
    return names


def limits(tokens: Sequence[int]) -> tuple[int, ...]:
    """Where one range of token counts ends and the next begins: halfway between two that were timed, as a ratio."""
    return tuple(int((a * b) ** 0.5) for a, b in itertools.pairwise(tokens))


def change_of(kernel: Kernel, weight: Tensor, bias: Tensor | None, x: Tensor) -> float:
    """How much the output of a kernel differs from torch's default, as a share of the largest; NaN where one is NaN."""
    with torch.inference_mode():
        expected = Dense()(x, weight, bias)
        return share_of_largest(expected, kernel(x, weight, bias))


def example(weight: Tensor, count: int) -> Tensor:
    """(count, in): an input of a layer for so many tokens, always the same."""
    return torch.randn(count, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)


def _times(
    kernels: dict[str, Kernel], weight: Tensor, bias: Tensor | None, count: int, tolerance: float
) -> dict[str, tuple[float, ...]]:
    """Seconds of each kernel in each round; of kernels that are far from the fastest, or inexact, there are none."""
    x = example(weight, count)
    right = [n for n, k in kernels.items() if n == "dense" or change_of(k, weight, bias, x) <= tolerance]
    runs = {name: partial(kernels[name], x, weight, bias) for name in right}
    with torch.inference_mode():
        first = time_together(runs, rounds=2, warmup=1)
        fastest = min(min(timings.wall) for timings in first.values())
        close = {n: run for n, run in runs.items() if n == "dense" or min(first[n].wall) < _HOPELESS * fastest}
        slowest = max(SHORTEST, *(min(first[name].wall) for name in close))
        rounds = max(7, min(_ROUNDS, int(_SECONDS / (slowest * len(close)))))
        return {name: timings.wall for name, timings in time_together(close, rounds=rounds, warmup=1).items()}
