"""Timing in turns, with clocks that the tests wind."""

import math

import pytest

from hf_prune.inference.timing import Ratio, Timings, quantile, speedup, time_together


class Clock:
    """A clock that things move forward."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_each_runs_once_a_round_in_changing_order():
    clock, calls = Clock(), []

    def run(name, seconds):
        def go():
            calls.append(name)
            clock.now += seconds

        return go

    runs = {"a": run("a", 1.0), "b": run("b", 2.0), "c": run("c", 4.0)}
    found = time_together(runs, rounds=20, warmup=2, clock=clock, cpu_clock=clock)
    assert found == {n: Timings((t,) * 20, (t,) * 20) for n, t in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    assert calls[:6] == ["a", "a", "b", "b", "c", "c"]
    rounds = [tuple(calls[i : i + 3]) for i in range(6, len(calls), 3)]
    assert len(rounds) == 20
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 3


def test_short_runs_are_repeated_within_a_round():
    clock, calls = Clock(), []

    def short():
        calls.append(1)
        clock.now += 1e-4

    found = time_together({"short": short}, rounds=5, warmup=1, clock=clock, cpu_clock=clock)
    assert len(calls) == 1 + 5 * 10
    assert found["short"].wall == pytest.approx((1e-4,) * 5)


def test_a_limit_of_seconds_leaves_five_rounds():
    clock = Clock()

    def slow():
        clock.now += 10.0

    assert len(time_together({"slow": slow}, rounds=50, seconds=1.0, clock=clock, cpu_clock=clock)["slow"].wall) == 5
    assert len(time_together({"slow": slow}, rounds=50, seconds=95.0, clock=clock, cpu_clock=clock)["slow"].wall) == 10


def test_speedup_is_the_median_of_ratios_within_rounds():
    before = [2.0, 4.0, 8.0, 2.0, 2.0, 2.0, 2.0]  # the machine was busy in two rounds, for both
    after = [1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0]
    assert speedup(before, after) == Ratio(2.0, 2.0, 2.0)
    assert speedup(before, after).is_real


def test_the_interval_is_that_of_the_sign_test():
    ratios = [float(i) for i in range(1, 11)]
    assert speedup(ratios, [1.0] * 10) == Ratio(5.5, 2.0, 9.0)  # ten values: the second and the last but one
    few = speedup([1.0, 2.0], [1.0, 1.0])
    assert (few.low, few.high) == (0.0, math.inf)
    assert not few.is_real


def test_noise_is_called_noise():
    before = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.05, 0.95, 1.0]
    assert not speedup(before, before[::-1]).is_real
    assert speedup([2 * x for x in before], before).is_real


def test_quantiles_by_hand():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.95) == pytest.approx(9.5)
    assert quantile([7.0], 0.25) == 7.0
