"""Whole output channels of convolutions."""

from __future__ import annotations

from hf_prune.granularities.base import Granularity
from hf_prune.granularities.registry import GRANULARITIES
from hf_prune.kernels.matrix import Target


@GRANULARITIES.register("channel")
class Channel(Granularity):
    """All weights of one output channel of a convolution."""

    name = "channel"
    usage = "channel"
    description = "whole output channels of convolutions"
    paper = "Li et al. 2017, arXiv:1608.08710"
    scopes = frozenset({"layer", "global"})
    spec = "channel"

    @classmethod
    def parse(cls, text: str) -> Channel | None:
        """Read ``"channel"``."""
        return cls() if text == cls.name else None

    def block_in(self, shape: tuple[int, int]) -> tuple[int, int]:
        """One channel by all of its inputs."""
        return 1, shape[1]

    def misfit(self, target: Target) -> str | None:
        """Only convolutions have channels."""
        return None if target.layout == "conv" else "it is not a convolution"
