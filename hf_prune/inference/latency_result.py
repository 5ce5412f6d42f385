"""The result of timing models, as a table and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hf_prune.inference.timing import Ratio
from hf_prune.utils.formatting import format_table, format_workload
from hf_prune.utils.results import Result


@dataclass(frozen=True)
class LatencyPoint:
    """One model on one workload.

    Args:
        model: Its name.
        batch_size: Number of examples.
        length: Tokens of each example; 0 for images and sound.
        task: ``"forward"``, or ``"generate"`` for prompt and generated tokens together.
        median: Seconds of wall time.
        low: Lower quartile.
        high: Upper quartile.
        p95: 95th percentile.
        cpu: Median CPU seconds of this process, over all of its threads.
        tokens_per_second: Tokens of all examples together: those read, or for ``"generate"`` those generated; None for
            images and sound.
        against: How many times as fast as the first model; None for the first.
    """

    model: str
    batch_size: int
    length: int
    task: str
    median: float
    low: float
    high: float
    p95: float
    cpu: float
    tokens_per_second: float | None
    against: Ratio | None

    @property
    def workload(self) -> str:
        """The task and its size, such as ``"forward, 1 x 128 tokens"``."""
        return f"{self.task}, {format_workload(self.batch_size, self.length)}"

    @property
    def verdict(self) -> str:
        """The speed-up over the first model, or why there is none to report."""
        if self.against is None:
            return "-"
        if math.isinf(self.against.high):
            return "too few rounds"
        return _ratio(self.against) if self.against.is_real else "within the noise"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the upper end of the interval is None after too few rounds."""
        if self.against is None:
            return dict(vars(self))
        high = None if math.isinf(self.against.high) else self.against.high
        return {**vars(self), "against": {**vars(self.against), "high": high, "is_real": self.against.is_real}}


@dataclass(frozen=True, repr=False)
class LatencyResult(Result):
    """Models timed in turns. ``print(result)`` shows them as a table.

    Args:
        points: One for each model and workload.
        rounds: How many rounds were timed.
        threads: Number of PyTorch threads.
        dtype: The dtype of the weights.
        device: The device of the models.
        torch: The version of PyTorch.
    """

    bars = ("median", "p95")

    points: tuple[LatencyPoint, ...]
    rounds: int
    threads: int
    dtype: str
    device: str
    torch: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"format_version": 1, **vars(self), "points": [p.to_dict() for p in self.points]}

    def doubts(self) -> list[str]:
        """A sentence for each model whose speed may equal that of the first, with the workloads and the numbers."""
        doubts: dict[str, list[str]] = {}
        for p in self.points:
            if p.against is not None and math.isinf(p.against.high):
                doubts.setdefault(p.model, []).append(f"{p.workload} (too few rounds for an interval, which takes six)")
            elif p.against is not None and not p.against.is_real:
                doubts.setdefault(p.model, []).append(f"{p.workload} ({_ratio(p.against)}, within the noise)")
        return [
            f"{model} and {self.points[0].model} are not told apart at {'; '.join(where)}."
            for model, where in doubts.items()
        ]

    def __str__(self) -> str:
        rows = [
            [
                p.model,
                p.task,
                f"{p.batch_size} x {p.length}" if p.length else str(p.batch_size),
                f"{1e3 * p.median:.2f}",
                f"{1e3 * p.low:.2f} to {1e3 * p.high:.2f}",
                f"{1e3 * p.p95:.2f}",
                f"{1e3 * p.cpu:.2f}",
                "-" if p.tokens_per_second is None else f"{p.tokens_per_second:,.0f}",
                p.verdict,
            ]
            for p in self.points
        ]
        header = ["model", "task", "batch x tokens", "median ms", "quartiles", "p95", "CPU ms", "tokens/s", "speed-up"]
        setting = (
            f"{self.rounds} rounds in turns, {self.dtype}, {self.device}, {self.threads} thread(s), torch {self.torch}."
        )
        if any(p.against is not None for p in self.points):
            setting += f" Speed-up: median over the rounds, and its 95 % interval, against {self.points[0].model}."
        lines = [format_table(header, rows, left=2), setting]
        if doubts := self.doubts():
            lines += [*doubts, "More rounds, or a quieter machine, may tell."]
        return "\n".join(lines)


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
