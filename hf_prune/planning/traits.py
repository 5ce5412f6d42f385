"""What settings mean, for code that must not care whether weights or whole units are removed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_prune.criteria.registry import CRITERIA, unit_rankings
from hf_prune.granularities.registry import parse_granularity
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.presets import PRESETS

if TYPE_CHECKING:  # which loads torch, that commands do without until they need it
    from hf_prune.granularities.base import Granularity

_WHOLE_OUTPUTS_OR_INPUTS = ("row", "column", "channel")


def removed_kinds(config: PruningConfig) -> tuple[str, ...]:
    """The kinds of units that are removed, such as ``("head", "neuron")``; none where weights are masked."""
    return tuple(config.granularity) if config.removes_units else ()


def weight_granularity(config: PruningConfig) -> Granularity | None:
    """How the weights of targets are divided into units; None where kinds of units are removed."""
    return None if config.removes_units else parse_granularity(config.granularity)


def fixed_sparsity(config: PruningConfig) -> float | None:
    """The sparsity that the granularity fixes, as 2:4 does; None if it may be any."""
    granularity = weight_granularity(config)
    return None if granularity is None else granularity.fixed_sparsity


def nm_pattern(config: PruningConfig) -> tuple[int, int] | None:
    """(N, M) of an N:M granularity; None for any other."""
    granularity = weight_granularity(config)
    if granularity is None or granularity.pool is None or granularity.fixed_sparsity is None:
        return None
    return round((1 - granularity.fixed_sparsity) * granularity.pool), granularity.pool


def criterion_learns(config: PruningConfig) -> bool:
    """Whether the criterion learns from calibration data."""
    return config.learns_units if config.removes_units else bool(CRITERIA.get(config.criterion).needs)


def criterion_paper(config: PruningConfig) -> str:
    """Where the criterion comes from."""
    return unit_rankings()[config.criterion].paper if config.removes_units else CRITERIA.get(config.criterion).paper


def granularity_text(config: PruningConfig) -> str:
    """What is removed together, in words."""
    granularity = weight_granularity(config)
    if granularity is None:
        return f"{' and '.join(config.granularity)}s"
    return f"granularity {granularity.spec} ({granularity.paper})"


def shrinks_by_default(config: PruningConfig) -> bool:
    """Whether commands cut out what was removed unless they are told otherwise."""
    return config.removes_units


def can_shrink(config: PruningConfig) -> bool:
    """Whether ``shrink()`` may find something to cut out."""
    return config.removes_units or config.granularity in _WHOLE_OUTPUTS_OR_INPUTS


def preset_of(config: PruningConfig) -> str | None:
    """The preset whose method a config has, whether it was named or not; None if there is none."""
    return next((name for name in PRESETS if config.replace(preset=name) == config), None)
