"""Schedules: how much to prune at which step of a training, as pure functions of progress.

A new schedule is one function with one decorator.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_prune.errors import ConfigError
from hf_prune.utils.registry import unknown_name

#: (progress from 0 to 1, sparsity at the beginning, sparsity at the end) -> sparsity
Curve = Callable[[float, float, float], float]
#: progress from 0 to 1 -> the share of the remaining weights that is exchanged for removed ones
Exchange = Callable[[float], float]

_CURVES: dict[str, tuple[Curve, Exchange | None]] = {}


def register_schedule(name: str, exchange: Exchange | None = None) -> Callable[[Curve], Curve]:
    """Function decorator that adds a schedule.

    Args:
        name: The name for ``Schedule(name)``.
        exchange: Also exchange weights at each update: the smallest remaining weights are removed, and as many removed
            weights come back, those with the largest gradients.

    Raises:
        ValueError: If the name is taken.

    Example:
        >>> @register_schedule("square_root")
        ... def square_root(progress, initial, final):
        ...     return initial + (final - initial) * progress**0.5
    """

    def add(curve: Curve) -> Curve:
        if name in _CURVES:
            raise ValueError(f"schedule {name!r} is already registered: choose another name")
        _CURVES[name] = (curve, exchange)
        return curve

    return add


def schedule_names() -> tuple[str, ...]:
    """All names, sorted."""
    return tuple(sorted(_CURVES))


@register_schedule("one_shot")
def one_shot(progress: float, initial: float, final: float) -> float:
    """Everything at the first step; the other steps of the schedule change nothing."""
    return final


@register_schedule("linear")
def linear(progress: float, initial: float, final: float) -> float:
    """The same number of weights at each update."""
    return initial + (final - initial) * progress


@register_schedule("cubic")
def cubic(progress: float, initial: float, final: float) -> float:
    """Fast while many weights are redundant, then slower (Zhu and Gupta 2017, arXiv:1710.01878)."""
    return final + (initial - final) * (1 - progress) ** 3


@register_schedule("iterative")
def iterative(progress: float, initial: float, final: float) -> float:
    """The same share of the remaining weights at each update, as in rounds of pruning (Han et al. 2015)."""
    if final >= 1:
        return final if progress >= 1 else initial
    return 1 - (1 - initial) ** (1 - progress) * (1 - final) ** progress


@register_schedule("rigl", exchange=lambda progress: 0.15 * (1 + math.cos(math.pi * progress)))
def rigl(progress: float, initial: float, final: float) -> float:
    """Everything at once, then exchange fewer and fewer weights (Evci et al. 2020, arXiv:1911.11134)."""
    return final


@dataclass(frozen=True)
class Schedule:
    """When a training prunes, and how much.

    Whole numbers are optimizer steps, fractions are shares of all steps of the training.

    Args:
        name: The curve: ``"one_shot"``, ``"linear"``, ``"cubic"``, ``"iterative"`` or ``"rigl"``.
        begin: The first update, after so many steps.
        end: The last update; None means 0.7 of the training, or ``begin`` for ``"one_shot"``.
        every: Steps from one update to the next.
        initial: Sparsity at the first update; before it nothing is pruned.

    Raises:
        ConfigError: If a value is unknown or out of range.

    Example:
        >>> schedule = Schedule("cubic", begin=10, end=50, every=20)
        >>> [round(schedule.sparsity(step, 100, 0.8), 3) for step in (0, 10, 30, 50, 70)]
        [0.0, 0.0, 0.7, 0.8, 0.8]
        >>> [step for step in range(101) if schedule.is_due(step, 100)]
        [10, 30, 50]
    """

    name: str = "cubic"
    begin: int | float = 0.0
    end: int | float | None = None
    every: int | float = 0.01
    initial: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in _CURVES:
            raise unknown_name("schedule", self.name, schedule_names())
        if self.end is None:
            object.__setattr__(self, "end", self.begin if self.name == "one_shot" else 0.7)
        for name in ("begin", "end", "every"):
            _check_moment(name, getattr(self, name))
        if not self.every:
            raise ConfigError("every is 0: expected a number of steps, or a share of all of them")
        if isinstance(self.initial, bool) or not isinstance(self.initial, int | float) or not 0 <= self.initial < 1:
            raise ConfigError(f"initial is {self.initial!r}: expected a sparsity of at least 0 and below 1")
        if type(self.begin) is type(self.end) and self.begin > self.end:
            raise ConfigError(f"the schedule begins at {self.begin} and ends at {self.end}: expected an end after that")

    @classmethod
    def parse(cls, value: Schedule | Mapping[str, Any] | str) -> Schedule:
        """A schedule from its name, or from a mapping as in JSON.

        Raises:
            ConfigError: If it is neither, or a value is wrong.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise ConfigError(f"schedule is {value!r}: expected a Schedule, its name, or a mapping of its settings")
        known = [field.name for field in dataclasses.fields(cls)]
        if wrong := sorted(set(value) - set(known)):
            raise ConfigError(f"schedule has unknown settings {', '.join(wrong)}: expected some of {', '.join(known)}")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @property
    def exchanges(self) -> bool:
        """Whether removed weights can come back at an update."""
        return _CURVES[self.name][1] is not None

    def span(self, steps: int) -> tuple[int, int, int]:
        """First update, last update, and the distance between updates, in steps.

        Args:
            steps: Steps of the whole training.

        Raises:
            ConfigError: If the training ends before the schedule does.
        """
        assert self.end is not None
        begin, end = (_in_steps(moment, steps) for moment in (self.begin, self.end))
        every = max(1, _in_steps(self.every, steps))
        if not begin <= end <= steps:
            raise ConfigError(
                f"the schedule prunes from step {begin} to step {end}, and the training has {steps} steps: expected "
                f"an end within the training and not before the begin; shorten the schedule or train longer"
            )
        return begin, end, every

    def progress(self, step: int, steps: int) -> float:
        """How far the schedule is after a step: 0 at its begin, 1 at its end."""
        begin, end, _ = self.span(steps)
        return min(1.0, max(0.0, (step - begin) / (end - begin))) if end > begin else float(step >= begin)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether masks change after a step."""
        begin, end, every = self.span(steps)
        return begin <= step <= end and ((step - begin) % every == 0 or step == end)

    def sparsity(self, step: int, steps: int, final: float) -> float:
        """The sparsity that an update after a step aims at.

        Args:
            step: Steps done.
            steps: Steps of the whole training.
            final: Sparsity at the end.
        """
        if step < self.span(steps)[0]:
            return 0.0
        return _CURVES[self.name][0](self.progress(step, steps), self.initial, final)

    def exchange(self, step: int, steps: int) -> float:
        """The share of the remaining weights that an update exchanges for removed ones; 0 at the last update."""
        exchange = _CURVES[self.name][1]
        return 0.0 if exchange is None or step >= self.span(steps)[1] else exchange(self.progress(step, steps))


def _check_moment(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (isinstance(value, float) and value > 1):  # type: ignore[operator,arg-type]
        raise ConfigError(
            f"{name} of the schedule is {value!r}: expected a whole number of steps, or a fraction from 0.0 to 1.0 of "
            f"all steps"
        )


def _in_steps(moment: int | float, steps: int) -> int:
    return moment if isinstance(moment, int) else round(moment * steps)
