"""Greedy: how much the predictions change without a layer, once the layers before it in the order are gone."""

from __future__ import annotations

from hf_prune.criteria.base import UnitCriterion, UnitRanking
from hf_prune.criteria.registry import CRITERIA


@CRITERIA.register("greedy")
class Greedy(UnitCriterion):
    """Layers are removed one after another, see ``hf_prune.structured.layer_losses``."""

    name = "greedy"
    units = UnitRanking(
        "texts",
        "change of the predictions, measured anew after each layer that is removed",
        "Song et al. 2024, arXiv:2402.09025",
        kinds=frozenset({"layer"}),
    )
