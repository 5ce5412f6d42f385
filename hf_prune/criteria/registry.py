"""The criteria, by name: those of single weights, and those of whole units."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_prune.utils.registry import Registry

if TYPE_CHECKING:
    from hf_prune.criteria.base import Criterion, UnitRanking


def _ranks_weights(entry: type) -> bool:
    from hf_prune.criteria.base import Criterion

    return issubclass(entry, Criterion)


CRITERIA: Registry[Criterion] = Registry("criterion", "hf_prune.criteria", listed=_ranks_weights)


def unit_rankings() -> dict[str, UnitRanking]:
    """How criteria rank whole units, by name; those that only a training can feed come last."""
    rankings = {name: entry.units for name, entry in CRITERIA.entries().items() if entry.units is not None}
    return dict(sorted(rankings.items(), key=lambda item: (item[1].needs == "a training", item[0])))
