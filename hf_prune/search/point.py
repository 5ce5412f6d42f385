"""One candidate of a search, and what was measured of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_prune.errors import DataError
from hf_prune.evaluation.allowed_loss import Loss
from hf_prune.planning.config import PruningConfig
from hf_prune.utils.results import Result


@dataclass(frozen=True, repr=False)
class SearchPoint(Result):
    """One candidate, as it was measured.

    Args:
        name: The preset and the level.
        preset: The preset.
        config: The settings that it stands for.
        plain: Whether plain transformers loads it, without hf_prune.
        loss: Against the dense model, on held-out data.
        score: The value of the metric, or the perplexity.
        size: Bytes of the weights' files.
        speedup: How many times as fast, measured; 1 where only zeros were made.
        sparsity: Share of the weights that are zero or gone, of all parameters.
        seconds: How long pruning took.
    """

    bars = ("score", "sparsity")

    name: str
    preset: str
    config: PruningConfig
    plain: bool
    loss: Loss
    score: float
    size: int
    speedup: float
    sparsity: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "config": self.config.to_dict(), "loss": vars(self.loss)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SearchPoint:
        """The point that :meth:`to_dict` described.

        Raises:
            DataError: If it is damaged.
        """
        try:
            config, loss = PruningConfig.from_dict(values["config"]), Loss(**values["loss"])
            point = cls(**{**values, "config": config, "loss": loss})
        except (KeyError, TypeError) as error:
            raise DataError(f"a point of the search is damaged: {error!r}") from error
        numbers = (*vars(loss).values(), point.score, point.size, point.speedup, point.sparsity, point.seconds)
        if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
            raise DataError(f"a point of the search is damaged: found {numbers!r}, expected numbers")
        return point
