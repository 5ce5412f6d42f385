"""Fair timing in turns, so that whatever else the machine does affects all alike, and the interval of a ratio."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hf_prune.utils.progress import Bar

MEDIAN_NOISE = 1.5  # factor by which a speed-up, a median of ratios, may differ from the ratio of the medians
SHORTEST = 1e-3  # seconds: shorter runs are repeated within one timing


@dataclass(frozen=True)
class Timings:
    """Seconds of one run, a number for each round.

    Args:
        wall: Wall time.
        cpu: CPU time of this process, over all of its threads.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one run is as another, with a 95 % interval for any distribution of times.

    Args:
        value: Median over the rounds of the ratio within a round.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float

    @property
    def is_real(self) -> bool:
        """Whether the interval excludes that both are equally fast."""
        return not self.low <= 1 <= self.high


def time_together(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    warmup: int = 3,
    seconds: float = math.inf,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.process_time,
) -> dict[str, Timings]:
    """Time several functions once a round, in a new random order every round.

    Args:
        runs: The functions by name; each waits for the work that it starts on other devices.
        rounds: How many rounds.
        warmup: How many rounds before the first one that counts.
        seconds: No round begins after so many seconds; five rounds run in any case.
        seed: Seed of the order.
        clock: Returns wall time in seconds.
        cpu_clock: Returns the CPU time of this process in seconds.
    """
    repeats = {}
    for name, run in runs.items():
        for _ in range(max(1, warmup)):
            start = clock()
            run()
            taken = clock() - start
        repeats[name] = max(1, math.ceil(SHORTEST / max(taken, 1e-9)))
    seconds_of: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    generator, begin = random.Random(seed), clock()
    for number in Bar(range(rounds), desc="Timing", unit="round"):
        if number >= min(5, rounds) and clock() - begin > seconds:
            break
        order = list(runs)
        generator.shuffle(order)
        for name in order:
            run, times = runs[name], repeats[name]
            cpu, start = cpu_clock(), clock()
            for _ in range(times):
                run()
            wall, cpu = clock() - start, cpu_clock() - cpu
            seconds_of[name][0].append(wall / times)
            seconds_of[name][1].append(cpu / times)
    return {name: Timings(tuple(wall), tuple(cpu)) for name, (wall, cpu) in seconds_of.items()}


def speedup(before: Sequence[float], after: Sequence[float]) -> Ratio:
    """How many times as fast ``after`` is as ``before``, round by round.

    Args:
        before: Seconds in each round.
        after: Seconds in the same rounds.

    Example:
        >>> speedup([2.0] * 10, [1.0] * 10)
        Ratio(value=2.0, low=2.0, high=2.0)
    """
    ratios = sorted(b / a for b, a in zip(before, after, strict=True))
    n = len(ratios)
    middle = (ratios[(n - 1) // 2] + ratios[n // 2]) / 2
    rank = _median_rank(n)
    if rank is None:  # too few rounds for an interval
        return Ratio(middle, 0.0, math.inf)
    return Ratio(middle, ratios[rank], ratios[n - 1 - rank])


def _median_rank(n: int, error: float = 0.05) -> int | None:
    """The largest k such that the median lies between the order statistics k and n-1-k with 95 % probability."""
    # The number of ratios below the median is binomial with p = 1/2, whatever their distribution.
    tail, rank = 0.0, None
    for k in range(n // 2):
        tail += math.comb(n, k) / 2**n
        if 2 * tail > error:
            break
        rank = k
    return rank


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
