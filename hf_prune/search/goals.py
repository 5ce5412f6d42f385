"""Goals of a search: what each asks for, at which levels, and which of two points is closer to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_prune.planning.config import PruningConfig
from hf_prune.utils.registry import unknown_name

PRESETS_TRIED = ("fast", "balanced", "best", "best+polish")  # cheapest first


@dataclass(frozen=True)
class Goal:
    """What a search is for.

    Args:
        name: The goal.
        setting: The setting of a :class:`hf_prune.PruningConfig` whose levels are tried.
        levels: Its values, from the least to the most removed.
        settings: Other settings.
        compressed: Whether checkpoints are saved compressed, so that zeros make them smaller.
        unit: How a level is written, a format.
        measured: The field of a point that counts.
        larger: Whether more of it is better.
    """

    name: str
    setting: str
    levels: tuple[float, ...]
    settings: Mapping[str, Any]
    compressed: bool
    unit: str
    measured: str
    larger: bool

    def config(self, preset: str, level: float, **more: Any) -> PruningConfig:
        """The settings of a preset at a level."""
        return PruningConfig(**{**self.settings, self.setting: level, "preset": preset, **more})

    def label(self, preset: str, level: float) -> str:
        """How a candidate is called."""
        return f"{preset}, {self.unit.format(level)}"


_SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
GOALS: Mapping[str, Goal] = {
    goal.name: goal
    for goal in (
        Goal("faster", "target_speedup", (1.25, 1.5, 2.0, 3.0, 4.0), {}, False, "{:g}x", "speedup", True),
        Goal("smaller", "sparsity", _SHARES, {}, True, "{:.0%} zeros, compressed", "size", False),
        Goal("sparser", "sparsity", _SHARES, {}, False, "{:.0%} zeros", "sparsity", True),
    )
}


def goal_named(name: str) -> Goal:
    """A goal by its name.

    Raises:
        UnknownNameError: If there is none.
    """
    if name not in GOALS:
        raise unknown_name("goal", name, list(GOALS))
    return GOALS[name]
