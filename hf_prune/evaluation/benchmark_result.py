"""Scores of the tasks of lm-eval, and the comparison of two models on the same examples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_prune.errors import DataError
from hf_prune.evaluation.saved_scores import check_fields
from hf_prune.utils.formatting import format_table
from hf_prune.utils.results import Result


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Args:
        task: Its name in lm-eval.
        metric: The metric, with the filter of the answers if there is one, such as ``"exact_match, strict-match"``.
        value: What lm-eval reports.
        standard_error: Of it, as lm-eval reports it; None if it does not.
        n: Number of examples.
        shots: How many solved examples stand before each.
        data_fingerprint: Hash of the examples; empty for a group of tasks, which are there too.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    n: int
    shots: int
    data_fingerprint: str


@dataclass(frozen=True, repr=False)
class BenchmarkScores(Result):
    """What lm-eval measured of one model.

    Attributes:
        scores: Every metric of every task.
        by_example: For each of them its value for each example, in the order of the data; empty where the metric is
            not their mean.
        version: Of lm-eval.
        limit: How many examples of each task were used, the first ones; None for all.
        seconds: Wall time.
        dtype: Of the weights, such as ``float32``.
        batch_size: Examples per forward pass.
    """

    bars = ("value",)

    scores: tuple[TaskScore, ...]
    by_example: tuple[tuple[float, ...], ...]
    version: str
    limit: int | None
    seconds: float
    dtype: str
    batch_size: int

    def __str__(self) -> str:
        """A line for each metric."""
        return "\n".join(
            f"{s.task}: {s.metric} {s.value:.4f}{'' if s.standard_error is None else f' ± {s.standard_error:.4f}'} "
            f"(n = {s.n:,}, {s.shots} shots, lm-eval {self.version})"
            for s in self.scores
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        scores = [dataclasses.asdict(score) for score in self.scores]
        return {**values, "scores": scores, "by_example": [list(row) for row in self.by_example]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchmarkScores:
        """The inverse of ``to_dict``.

        Raises:
            DataError: If a field is missing or unknown, or a value is not the mean of those of its examples.
        """
        check_fields(cls, values, "benchmark")
        for row in values["scores"]:
            check_fields(TaskScore, row, "score of a benchmark")
        scores = tuple(TaskScore(**row) for row in values["scores"])
        rows = tuple(tuple(map(float, row)) for row in values["by_example"])
        if len(rows) != len(scores):
            raise DataError(f"not a saved benchmark: {len(scores)} scores and {len(rows)} rows of examples")
        for score, row in zip(scores, rows, strict=True):
            if row and not is_mean(score.value, row):
                raise DataError(
                    f"{score.task} has {score.metric} {score.value!r}, and its examples give "
                    f"{math.fsum(row) / len(row)!r}: the file was edited; measure again"
                )
        return cls(**{**values, "scores": scores, "by_example": rows})


@dataclass(frozen=True)
class TaskComparison:
    """One metric of one task, of both models.

    Args:
        task: Its name in lm-eval.
        metric: The metric.
        dense: Of the dense model.
        pruned: Of the pruned model.
        change: ``pruned - dense``.
        interval: Two-sided confidence interval of the change, paired over the examples; None where the metric is not a
            mean over examples, or there is one example.
        n: Number of examples.
    """

    task: str
    metric: str
    dense: float
    pruned: float
    change: float
    interval: tuple[float, float] | None
    n: int


@dataclass(frozen=True, repr=False)
class BenchmarkComparison(Result):
    """A pruned model compared with the dense one on the tasks of lm-eval, on the same examples.

    Attributes:
        tasks: Every metric of every task.
        confidence: Of the intervals, 0 to 1.
    """

    bars = ("pruned", "dense")

    tasks: tuple[TaskComparison, ...]
    confidence: float

    def __str__(self) -> str:
        """A table, with a row for each metric."""
        header = ["task", "metric", "n", "dense", "pruned", "change", f"{100 * self.confidence:g} %, paired"]
        cells = [
            [t.task, t.metric, f"{t.n:,}", f"{t.dense:.4f}", f"{t.pruned:.4f}", f"{t.change:+.4f}", interval_text(t)]
            for t in self.tasks
        ]
        return format_table(header, cells, left=2)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        tasks = [
            {**dataclasses.asdict(t), "interval": None if t.interval is None else list(t.interval)} for t in self.tasks
        ]
        return {"tasks": tasks, "confidence": self.confidence}


def interval_text(task: TaskComparison) -> str:
    """The interval of a change, or a dash."""
    return "-" if task.interval is None else f"{task.interval[0]:+.4f} to {task.interval[1]:+.4f}"


def is_mean(value: float, row: tuple[float, ...]) -> bool:
    """Whether a value is the mean of those of the examples."""
    return math.isclose(value, math.fsum(row) / len(row), rel_tol=1e-6, abs_tol=1e-9)
