"""Fair timing: in turns, so that what else the machine does hits all alike; and how sure a ratio is."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

SHORTEST = 1e-3  # seconds: what is shorter is repeated within one timing


@dataclass(frozen=True)
class Timings:
    """Seconds of one thing, a number for each round.

    Args:
        wall: By the clock.
        cpu: Of this process, over all of its threads.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one thing is as another, and a 95 % interval.

    Args:
        value: Median over the rounds of the ratio within each.
        low: Lower end, which does not depend on how times are distributed.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def is_real(self) -> bool:
        """Whether the interval excludes that they are equally fast."""
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
    """Time each of some calls once a round, in an order that is drawn anew for every round.

    Args:
        runs: What to call, by name; each has to wait for what it starts on other devices.
        rounds: How many rounds.
        warmup: How many rounds before the first one that counts.
        seconds: After how many seconds no further round begins; there are five in any case.
        seed: Of the order.
        clock: Seconds by the clock.
        cpu_clock: Seconds of this process.
    """
    repeats = {}
    for name, run in runs.items():
        for _ in range(max(1, warmup)):
            start = clock()
            run()
            taken = clock() - start
        repeats[name] = max(1, math.ceil(SHORTEST / max(taken, 1e-9)))
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    generator, begin = random.Random(seed), clock()
    for number in range(rounds):
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
            found[name][0].append(wall / times)
            found[name][1].append(cpu / times)
    return {name: Timings(tuple(wall), tuple(cpu)) for name, (wall, cpu) in found.items()}


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
    tail, found = 0.0, None
    for k in range(n // 2):
        tail += math.comb(n, k) / 2**n
        if 2 * tail > error:
            break
        found = k
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
