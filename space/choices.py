"""What a visitor can choose: what is removed, how it is chosen, and whether the rest is repaired."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_prune import CRITERIA, PRESETS, ConfigError, PruningConfig
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
GOALS = {"A faster model": "Heads and neurons", "A smaller file": "Single weights"}  # what each of them removes


def criteria_for(what: str) -> dict[str, str]:
    """The presets and criteria on offer for what is removed, each with a line that explains it.

    Criteria that need labels or a training are left out, and the block Fisher criterion, which takes minutes.
    """
    if isinstance(WHAT[what], tuple):
        criteria = {name: r.description for name, r in unit_rankings().items() if r.needs != "a training"}
    else:
        slow = LABELLED | TRAINED | CURVATURE
        criteria = {n: CRITERIA.get(n).description for n in CRITERIA.names() if not CRITERIA.get(n).needs & slow}
    presets = {name: preset.summary for name, preset in PRESETS.items() if "polish" not in preset.weights}
    return {name: line for name, line in {**presets, **criteria}.items() if _config(what, name) is not None}


def presets_for(what: str) -> list[str]:
    """The presets on offer for what is removed, without those that come to the same as one before."""
    configs: dict[str, PruningConfig | None] = {}
    for name in criteria_for(what):
        if name in PRESETS and (config := _config(what, name)) not in configs.values():
            configs[name] = config
    return list(configs)


def reason_for(what: str, how: str) -> str:
    """What a preset or a criterion does, in a sentence or two."""
    if how not in PRESETS:
        return f"{how}: {criteria_for(what)[how]}."
    goal, left = (
        ("heads and neurons", "60 % of the parameters left")
        if isinstance(WHAT[what], tuple)
        else ("zeros", "80 % zeros")
    )
    summary = PRESETS[how].summary
    return (
        f"{summary[0].upper()}{summary[1:]}. With {left}, another small classifier lost {PRESETS[how].measured[goal]}."
    )


def can_repair(what: str, how: str) -> bool:
    """Whether a repair is to be chosen: presets have their own, and after whole layers there is nothing to repair."""
    return how not in PRESETS and WHAT[what] != ("layer",) and _config(what, how, repair="least_squares") is not None


def fixed_sparsity(what: str) -> float | None:
    """The sparsity that follows from what is removed, as in 2:4."""
    return 0.5 if WHAT[what] == "2:4" else None


def _config(what: str, how: str, **more: Any) -> PruningConfig | None:
    scope = "global" if isinstance(WHAT[what], tuple) else None
    method = {"preset": how} if how in PRESETS else {"criterion": how}
    try:
        return PruningConfig(granularity=WHAT[what], scope=scope, **method, **more)
    except ConfigError:
        return None


def make_config(what: str, how: str, repair: bool, sparsity: float) -> PruningConfig:
    """The settings of a pruning.

    Args:
        what: What is removed, a key of ``WHAT``.
        how: The preset, or the criterion that chooses it.
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
    more = {"repair": "least_squares"} if repair else {}
    config = _config(what, how, sparsity=sparsity if fixed is None else fixed, **more)
    assert config is not None
    return config
