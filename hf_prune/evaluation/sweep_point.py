"""One point of a sweep: a criterion and a sparsity, and what was measured there."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_prune.errors import DataError
from hf_prune.evaluation.divergence import read_divergence
from hf_prune.evaluation.scores import (
    Score,
    ScoreComparison,
    changed_answers,
    compare_scores,
    has_distributions,
    read_score,
)
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.utils.results import Result

_LARGEST = 1e15  # of any number in a result


@dataclass(frozen=True, repr=False)
class SweepPoint(Result):
    """One pruning and its score.

    Args:
        criterion: The criterion.
        sparsity: The sparsity asked for.
        target_sparsity: Share of the target weights that is zero.
        model_sparsity: Zeros in the targets as a share of all parameters.
        remaining: Parameters of the whole model less those zeros.
        prune_seconds: How long pruning took, calibration included.
        evaluation: The score.
        comparison: The paired comparison with the dense model.
        acceleration: What the fastest kernels bring it on this machine, if that was measured.
    """

    bars = ("sparsity", "model_sparsity")

    criterion: str
    sparsity: float
    target_sparsity: float
    model_sparsity: float
    remaining: int
    prune_seconds: float
    evaluation: Score
    comparison: ScoreComparison
    acceleration: AccelerationReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {"evaluation": self.evaluation.to_dict(), "comparison": self.comparison.to_dict()}
        del values["acceleration"]
        return values if self.acceleration is None else {**values, "acceleration": self.acceleration.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], dense: Score, confidence: float) -> SweepPoint:
        """The point that :meth:`to_dict` described; score and comparison are computed again from the predictions.

        The divergence from the dense model is the saved one where the distributions were too many for the file.

        Raises:
            DataError: If a value is of another type or out of range, or not what the predictions give.
        """
        if not isinstance(values, dict) or not isinstance(values.get("evaluation"), dict):
            raise DataError(f"a point is {reprlib.repr(values)}: expected an object with a score")
        if not isinstance(values["criterion"], str):
            raise DataError(f"criterion is {values['criterion']!r}: expected a name")
        evaluation = read_score(values["evaluation"])
        fields = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name != "acceleration"}
        for name in ("sparsity", "target_sparsity", "model_sparsity", "remaining", "prune_seconds"):
            value, most = fields[name], 1 if name.endswith("sparsity") else math.inf
            types = (int,) if name == "remaining" else (int, float)
            if type(value) not in types or not (0 <= value <= most and value < _LARGEST):
                raise DataError(f"{name} is {value!r}: expected a number from 0 to {most:g}")
        comparison, compared = compare_scores(dense, evaluation, confidence=confidence), values["comparison"]
        saved = compared.get("divergence") if isinstance(compared, dict) else None
        if comparison.divergence is None and isinstance(saved, dict) and has_distributions(dense):
            moved = read_divergence(saved, changed_answers(dense, evaluation), dense.n, confidence)
            comparison = dataclasses.replace(comparison, divergence=moved)
        fields |= {"evaluation": evaluation, "comparison": comparison}
        if (acceleration := values.get("acceleration")) is not None:
            fields["acceleration"] = AccelerationReport.from_dict(acceleration)
        return cls(**fields)
