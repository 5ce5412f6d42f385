"""Whole inputs: columns of the (out, in) matrix."""

from __future__ import annotations

from hf_prune.granularities.base import Granularity
from hf_prune.granularities.registry import GRANULARITIES


@GRANULARITIES.register("column")
class Column(Granularity):
    """All weights of one input at one kernel position; ``shrink()`` removes neurons that are no longer read."""

    name = "column"
    usage = "column"
    description = "whole inputs, such as the columns of a Linear"
    paper = "Wen et al. 2016, arXiv:1608.03665"
    scopes = frozenset({"layer", "global"})
    spec = "column"

    @classmethod
    def parse(cls, text: str) -> Column | None:
        """Read ``"column"``."""
        return cls() if text == cls.name else None

    def block_in(self, shape: tuple[int, int]) -> tuple[int, int]:
        """All outputs by one input."""
        return shape[0], 1
