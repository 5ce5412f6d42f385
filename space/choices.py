"""What a visitor can choose: what is removed, how it is chosen, and whether the rest is repaired."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_prune import CRITERIA, ConfigError, PruningConfig
from hf_prune.criteria.base import CURVATURE, LABELLED, TRAINED
from hf_prune.criteria.registry import unit_rankings

WHAT: Mapping[str, str | tuple[str, ...]] = {
    "Single weights": "unstructured",
    "Two of every four weights (2:4)": "2:4",
    "Blocks of sixteen weights": "block:1x16",
    "Attention heads": ("head",),
    "Neurons": ("neuron",),
    "Heads and neurons": ("head", "neuron"),
    "Whole layers": ("layer",),
}


def criteria_for(what: str) -> dict[str, str]:
    """The criteria on offer for what is removed, each with a line that explains it.

    Criteria that need labels or a training are left out, and the block Fisher criterion, which takes minutes.
    """
    if isinstance(WHAT[what], tuple):
        criteria = {name: r.description for name, r in unit_rankings().items() if r.needs != "a training"}
    else:
        slow = LABELLED | TRAINED | CURVATURE
        criteria = {n: CRITERIA.get(n).description for n in CRITERIA.names() if not CRITERIA.get(n).needs & slow}
    return {name: line for name, line in criteria.items() if _config(what, name) is not None}


def can_repair(what: str, how: str) -> bool:
    """Whether a least-squares repair is possible: after whole layers there is nothing to repair."""
    return WHAT[what] != ("layer",) and _config(what, how, repair="least_squares") is not None


def fixed_sparsity(what: str) -> float | None:
    """The sparsity that follows from what is removed, as in 2:4."""
    return 0.5 if WHAT[what] == "2:4" else None


def _config(what: str, how: str, **more: Any) -> PruningConfig | None:
    scope = "global" if isinstance(WHAT[what], tuple) else None
    try:
        return PruningConfig(granularity=WHAT[what], criterion=how, scope=scope, **more)
    except ConfigError:
        return None


def make_config(what: str, how: str, repair: bool, sparsity: float) -> PruningConfig:
    """The settings of a pruning.

    Args:
        what: What is removed, a key of ``WHAT``.
        how: The criterion that chooses it.
        repair: Whether the rest is repaired by least squares.
        sparsity: The share that is removed, 0 to 0.95.

    Raises:
        ConfigError: If a choice is unknown, or they contradict one another.
    """
    if what not in list(WHAT):
        raise ConfigError(f"{str(what)[:40]!r} cannot be removed: expected one of {', '.join(WHAT)}")
    if how not in list(criteria_for(what)):
        raise ConfigError(f"{str(how)[:40]!r} cannot choose them: expected one of {', '.join(criteria_for(what))}")
    if repair and not can_repair(what, how):
        raise ConfigError(f"a repair does not go with {how!r} and {what!r}: leave it out")
    if not isinstance(sparsity, int | float) or not 0 <= sparsity <= 0.95:
        raise ConfigError(f"the sparsity is {str(sparsity)[:20]}: expected a number from 0 to 0.95")
    fixed = fixed_sparsity(what)
    config = _config(
        what, how, sparsity=sparsity if fixed is None else fixed, repair="least_squares" if repair else None
    )
    assert config is not None
    return config
