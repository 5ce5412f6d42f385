"""Blocks of R outputs by C inputs."""

from __future__ import annotations

import re

from hf_prune.errors import ConfigError
from hf_prune.granularities.base import Granularity
from hf_prune.granularities.registry import GRANULARITIES


@GRANULARITIES.register("block")
class Block(Granularity):
    """Rectangles of a grid over the (out, in) matrix."""

    name = "block"
    usage = "block:RxC (such as block:16x1)"
    description = "rectangles of R outputs by C inputs: for block-sparse kernels"
    paper = "Lagunas et al. 2021, arXiv:2109.04838"

    def __init__(self, rows: int, columns: int) -> None:
        if rows < 1 or columns < 1:
            raise ConfigError(f"granularity 'block:{rows}x{columns}': expected at least 1 output and 1 input")
        self.block = (rows, columns)
        self.spec = f"block:{rows}x{columns}"

    @classmethod
    def parse(cls, text: str) -> Block | None:
        """Read ``"block:16x1"``, or ``"16x1"`` for short."""
        match = re.fullmatch(r"(?:block:)?(\d{1,18})x(\d{1,18})", text)
        return cls(int(match[1]), int(match[2])) if match else None
