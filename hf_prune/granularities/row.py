"""Whole outputs: rows of the (out, in) matrix."""

from __future__ import annotations

from hf_prune.granularities.base import Granularity
from hf_prune.granularities.registry import GRANULARITIES


@GRANULARITIES.register("row")
class Row(Granularity):
    """All weights of one output; ``shrink()`` removes outputs that are neurons of a known architecture."""

    name = "row"
    usage = "row"
    description = "whole outputs, such as the rows of a Linear"
    paper = "Li et al. 2017, arXiv:1608.08710"
    scopes = frozenset({"layer", "global"})
    spec = "row"

    @classmethod
    def parse(cls, text: str) -> Row | None:
        """Read ``"row"``."""
        return cls() if text == cls.name else None

    def block_in(self, shape: tuple[int, int]) -> tuple[int, int]:
        """One output by all inputs."""
        return 1, shape[1]
