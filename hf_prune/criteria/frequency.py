"""Frequency: how many tokens are sent to an expert. Ranks experts only."""

from __future__ import annotations

from hf_prune.criteria.base import UnitCriterion, UnitRanking
from hf_prune.criteria.registry import CRITERIA


@CRITERIA.register("frequency")
class Frequency(UnitCriterion):
    """Share of the tokens that are sent to an expert, see ``hf_prune.structured.routing``."""

    name = "frequency"
    units = UnitRanking(
        "texts",
        "share of the tokens that a router sends to an expert",
        "Chen et al. 2022, arXiv:2206.00277",
        kinds=frozenset({"expert"}),
    )
