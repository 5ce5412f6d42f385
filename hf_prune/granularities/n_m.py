"""N:M sparsity: at most N non-zeros in every M consecutive inputs."""

from __future__ import annotations

import re

from hf_prune.errors import ConfigError
from hf_prune.granularities.base import Granularity
from hf_prune.granularities.registry import GRANULARITIES


@GRANULARITIES.register("n:m")
class NM(Granularity):
    """Pools of M consecutive inputs of one output, each keeping N weights."""

    name = "n:m"
    usage = "N:M (such as 2:4)"
    description = "at most N non-zeros in every M consecutive inputs: 2:4 for sparse tensor cores"
    paper = "Mishra et al. 2021, arXiv:2104.08378"
    scopes = frozenset({"layer"})

    def __init__(self, n: int, m: int) -> None:
        if not 1 <= n < m:
            raise ConfigError(f"granularity '{n}:{m}': expected N:M with 1 <= N < M, such as 2:4")
        self.spec = f"{n}:{m}"
        self.n = n
        self.pool = m
        self.fixed_sparsity = 1 - n / m

    @classmethod
    def parse(cls, text: str) -> NM | None:
        """Read ``"2:4"``."""
        match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text)
        return cls(int(match[1]), int(match[2])) if match else None
