"""Reconstruction: how much the outputs change once least squares has repaired what it can. Ranks whole units only."""

from __future__ import annotations

from hf_prune.criteria.base import UnitCriterion, UnitRanking
from hf_prune.criteria.registry import CRITERIA


@CRITERIA.register("reconstruction")
class Reconstruction(UnitCriterion):
    """The optimal brain surgeon on the columns of a unit, see ``hf_prune.structured.loss_curves``."""

    name = "reconstruction"
    units = UnitRanking(
        "texts", "change of the outputs that least squares cannot prevent", "Kurtic et al. 2023, arXiv:2302.04089"
    )
