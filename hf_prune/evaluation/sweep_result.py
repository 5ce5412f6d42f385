"""What a sweep measured: its points, the sweet spot, and the table, CSV and plot that are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.errors import SweepError
from hf_prune.evaluation.allowed_loss import AllowedLoss
from hf_prune.evaluation.divergence import Divergence
from hf_prune.evaluation.scores import Score, score_doubt
from hf_prune.evaluation.sweep_point import SweepPoint
from hf_prune.evaluation.sweep_speed import speed_cells, speed_columns
from hf_prune.evaluation.tradeoff_plots import plot_speed, plot_tradeoff
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.utils.figures import is_drawn, save_figure
from hf_prune.utils.files import write_json, write_text
from hf_prune.utils.formatting import format_csv, format_table, format_workload
from hf_prune.utils.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("results.json", "results.csv", "tradeoff.png", "speed.png")
FORMAT_VERSION = 1


@dataclass(frozen=True, repr=False)
class SweepResult(Result):
    """What a sweep measured. ``print(result)`` shows the table and the sweet spot.

    Args:
        settings: Everything that results must agree on to stand in one table.
        parameters: Parameters of the whole model.
        dense: The score of the dense model.
        points: One per criterion and sparsity.
        tolerance: Largest accepted drop, in points: hundredths of the score.
        confidence: Confidence of the intervals and of the sweet spot.
        max_flips: Where the sweet spot is named by it: the largest accepted share of changed answers, in percent.
        dense_acceleration: What the fastest kernels bring the dense model on this machine, if that was measured.
    """

    bars = ("accuracy", "spearman", "ndcg", "drop")

    settings: Mapping[str, Any]
    parameters: int
    dense: Score
    points: tuple[SweepPoint, ...]
    tolerance: float
    confidence: float
    max_flips: float | None = None
    dense_acceleration: AccelerationReport | None = None

    @property
    def allowed(self) -> AllowedLoss:
        """What the sweet spot may lose."""
        flips = self.max_flips
        return AllowedLoss(self.tolerance) if flips is None else AllowedLoss(flips, flips=True)

    @property
    def doubt(self) -> str:
        """Why the drops say nothing about what pruning costs, in words; empty if they do."""
        return score_doubt(self.dense, self.confidence)

    @property
    def sweet_spot(self) -> SweepPoint | None:
        """The largest sparsity that loses at most what is allowed, with the stated confidence; or None.

        The one-sided upper bound of the paired drop, or of the share of changed answers, decides, and between criteria
        the smaller loss. Also None if the drops say nothing, see :attr:`doubt`.
        """
        if self.doubt:
            return None
        allowed = self.allowed
        within = [p for p in self.points if p.sparsity > 0 and allowed.allows(p.comparison)]
        return max(within, key=lambda p: (p.model_sparsity, -allowed.loss(p.comparison).value), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        best = self.sweet_spot
        return {
            "format_version": FORMAT_VERSION,
            "settings": dict(self.settings),
            "parameters": self.parameters,
            "tolerance": self.tolerance,
            **({} if self.max_flips is None else {"max_flips": self.max_flips}),
            "confidence": self.confidence,
            "doubt": self.doubt,
            "sweet_spot": None if best is None else {"criterion": best.criterion, "sparsity": best.sparsity},
            "dense": self.dense.to_dict(),
            "points": [p.to_dict() for p in self.points],
            **({} if (timed := self.dense_acceleration) is None else {"dense_acceleration": timed.to_dict()}),
        }

    def rows(self) -> list[dict[str, Any]]:
        """The table as flat rows, the dense model first; scores times 100, in a column named like the metric."""
        metric = self.dense.metric
        moved = any(p.comparison.divergence is not None for p in self.points)  # not of kinds without distributions
        timed = self.speeds
        dense = {
            "criterion": "dense",
            "sparsity": 0.0,
            "model_sparsity": 0.0,
            "remaining": self.parameters,
            metric: 100 * self.dense.value,
            "standard_error": 100 * self.dense.standard_error,
            "n": self.dense.n,
            "drop": 0.0,
            "drop_standard_error": 0.0,
            "drop_low": 0.0,
            "drop_high": 0.0,
            **(_moved(None, 0.0) if moved else {}),
            "p_value": 1.0,
            "prune_seconds": 0.0,
            **(speed_columns(self.dense_acceleration) if timed else {}),
        }
        return [dense] + [
            {
                "criterion": p.criterion,
                "sparsity": p.sparsity,
                "model_sparsity": p.model_sparsity,
                "remaining": p.remaining,
                metric: 100 * p.evaluation.value,
                "standard_error": 100 * p.evaluation.standard_error,
                "n": p.evaluation.n,
                "drop": p.comparison.drop,
                "drop_standard_error": p.comparison.drop_standard_error,
                "drop_low": p.comparison.interval[0],
                "drop_high": p.comparison.interval[1],
                **(_moved(p.comparison.divergence) if moved else {}),
                "p_value": p.comparison.p_value,
                "prune_seconds": p.prune_seconds,
                **(speed_columns(p.acceleration) if timed else {}),
            }
            for p in self.points
        ]

    def to_csv(self) -> str:
        """:meth:`rows` as CSV."""
        rows = self.rows()
        return format_csv(list(rows[0]), rows)

    def __str__(self) -> str:
        metric = self.dense.metric
        sign = " %" if metric == "accuracy" else ""  # a rank correlation times 100 is no share of anything
        cells = [
            [
                row["criterion"],
                f"{100 * row['sparsity']:g} %",
                f"{100 * row['model_sparsity']:.2f} %",
                f"{row['remaining']:,}",
                f"{row[metric]:.2f}{sign}",
                "-" if row["criterion"] == "dense" else f"{row['drop']:.2f} ± {row['drop_standard_error']:.2f}",
                "-" if row["criterion"] == "dense" else f"{row['drop_low']:.2f} to {row['drop_high']:.2f}",
                *_moved_cells(row),
                "-" if row["criterion"] == "dense" else f"{row['p_value']:.2g}",
                *speed_cells(row),
            ]
            for row in self.rows()
        ]
        percent = f"{100 * self.confidence:g} %"
        header = ["criterion", "target", "of all weights", "remaining", metric, "drop ± s.e.", percent]
        moved = "kl" in self.rows()[0]
        header += [*(["KL ± s.e.", "changed ± s.e."] if moved else []), "p", *(["speed-up"] if self.speeds else [])]
        where = " ".join(filter(None, [self.dense.source, self.dense.split]))
        test = "McNemar's exact test" if metric == "accuracy" else "a normal test of the drop"
        note = (
            f"n = {self.dense.n} ({where}); drop in points against the dense model on the same examples, its standard "
            f"error and {percent} interval paired, p by {test}."
        )
        if moved:
            note += " KL: mean divergence from the dense model's predictions, in nats; changed: answers, in per cent."
        if self.speeds:
            note += (
                f" Speed-up: end to end on the kernels that accelerate() chooses, against torch's own, and its 95 % "
                f"interval; {self._workload}."
            )
        warning = [f"Warning: {self.doubt}."] if self.doubt else []
        return "\n".join([*warning, format_table(header, cells), note, self.verdict()])

    def verdict(self) -> str:
        """One sentence that names the sweet spot, or says why there is none."""
        best, percent, allowed = self.sweet_spot, f"{100 * self.confidence:g} %", self.allowed
        what = "change" if allowed.flips else "drop"
        if best is not None:
            lost = allowed.loss(best.comparison)
            return (
                f"Sweet spot: {100 * best.sparsity:g} % with {best.criterion}: its measured {what} is "
                f"{lost.value:.2f} {allowed.unit}, and with {percent} confidence at most "
                f"{lost.bound:.2f} (tolerance {allowed.most:g})."
            )
        if not self.points:
            return "Sweet spot: none, since nothing was pruned."
        if self.doubt:
            return f"Sweet spot: none is named, since {self.doubt}."
        lowest = min(self.points, key=lambda p: allowed.loss(p.comparison).bound)
        return (
            f"Sweet spot: none of these. The best bound is at {100 * lowest.sparsity:g} % with {lowest.criterion}: at "
            f"most {allowed.loss(lowest.comparison).bound:.2f} {allowed.unit} with {percent} confidence, above the "
            f"tolerance of {allowed.most:g}. Try smaller sparsities, more data, or a larger tolerance."
        )

    def plot(self) -> Figure:
        """The score against the sparsity, with intervals of the paired drops, the dense model and the sweet spot."""
        where = " ".join(filter(None, [self.dense.source, self.dense.split]))
        subtitle = f"{where}, n = {self.dense.n}; bars: {100 * self.confidence:g} % interval of the paired drop"
        name, dense = str(self.settings["model"]), self.dense
        return plot_tradeoff(dense.value, self.points, self.sweet_spot, name, subtitle, dense.metric)

    def plot_speed(self) -> Figure:
        """The score against the measured speed-up, with the intervals of both.

        Raises:
            SweepError: If no speed-up was measured.
        """
        if not self.speeds:
            raise SweepError("no speed-up was measured: sweep again with --accelerate (accelerate=True)")
        where = " ".join(filter(None, [self.dense.source, self.dense.split]))
        subtitle = f"{where}, n = {self.dense.n}; bars: {100 * self.confidence:g} % intervals\n{self._workload}"
        shown = (self.dense.value, self.dense_acceleration, self.points, self.sweet_spot)
        return plot_speed(*shown, str(self.settings["model"]), subtitle, self.dense.metric)

    @property
    def speeds(self) -> tuple[AccelerationReport, ...]:
        """What was measured of kernels: of the dense model first, and of the points."""
        every = (self.dense_acceleration, *(p.acceleration for p in self.points))
        return tuple(report for report in every if report is not None)

    @property
    def _workload(self) -> str:
        """What the speed-ups were measured on."""
        report = self.speeds[0]
        size = format_workload(report.batch_size, report.length)
        return f"{size}, threads: {report.threads}, {report.machine['cpu']}"

    @property
    def file_names(self) -> tuple[str, ...]:
        """The files that :meth:`write` writes."""
        return FILES if self.speeds else FILES[:-1]

    def write(self, folder: Path) -> list[Path]:
        """Write ``results.json``, ``results.csv``, ``tradeoff.png``, and ``speed.png`` if there are speeds, atomically.

        Args:
            folder: Where to.

        Returns:
            The files.
        """
        files = [write_json(folder / "results.json", self.to_dict())]
        files.append(write_text(folder / "results.csv", self.to_csv()))
        files.append(save_figure(self.plot(), folder / "tradeoff.png"))
        speed = folder / "speed.png"
        if self.speeds:
            files.append(save_figure(self.plot_speed(), speed))
        elif is_drawn(speed):  # of results that these replace
            speed.unlink()
        return files


def _moved(divergence: Divergence | None, unknown: float | None = None) -> dict[str, Any]:
    """Columns of how far the predictions moved."""
    names = {"kl": "kl", "kl_standard_error": "kl_standard_error", "changed": "flips"}
    names |= {"changed_standard_error": "flips_standard_error"}
    return {column: unknown if divergence is None else getattr(divergence, name) for column, name in names.items()}


def _moved_cells(row: Mapping[str, Any]) -> list[str]:
    """The same as texts; of the dense model, from which they moved, nothing."""
    if "kl" not in row:
        return []
    if row["criterion"] == "dense" or row["kl"] is None:
        return ["-", "-"]
    return [
        f"{row['kl']:.4f} ± {row['kl_standard_error']:.4f}",
        f"{row['changed']:.2f} ± {row['changed_standard_error']:.2f}",
    ]
