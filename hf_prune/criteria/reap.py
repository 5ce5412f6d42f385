"""REAP: how much an expert adds to what its mixture computes, where a token is sent to it. Ranks experts only."""

from __future__ import annotations

from hf_prune.criteria.base import UnitCriterion, UnitRanking
from hf_prune.criteria.registry import CRITERIA


@CRITERIA.register("reap")
class Reap(UnitCriterion):
    """Mean norm of the weighted output of an expert over its tokens, see ``hf_prune.structured.routing``."""

    name = "reap"
    units = UnitRanking(
        "texts",
        "router-weighted norm of an expert's outputs, averaged over the tokens sent to it",
        "Lasby et al. 2025, arXiv:2510.13999",
        kinds=frozenset({"expert"}),
    )
