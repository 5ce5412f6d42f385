"""Single weights."""

from __future__ import annotations

from hf_prune.granularities.base import Granularity
from hf_prune.granularities.registry import GRANULARITIES


@GRANULARITIES.register("unstructured")
class Unstructured(Granularity):
    """Every weight by itself."""

    name = "unstructured"
    usage = "unstructured"
    description = "single weights: the best accuracy; smaller files, no faster on dense kernels"
    paper = "Han et al. 2015, arXiv:1506.02626"
    spec = "unstructured"

    @classmethod
    def parse(cls, text: str) -> Unstructured | None:
        """Read ``"unstructured"``."""
        return cls() if text == cls.name else None
