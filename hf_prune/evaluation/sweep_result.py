"""What a sweep measured: its points, the sweet spot, and the table, CSV and plot that are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_prune.evaluation.plots import plot_tradeoff, save_figure
from hf_prune.evaluation.scores import Score, score_doubt
from hf_prune.evaluation.sweep_point import SweepPoint
from hf_prune.utils.files import write_json, write_text
from hf_prune.utils.formatting import format_csv, format_table

FILES = ("results.json", "results.csv", "tradeoff.png")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class SweepResult:
    """What a sweep measured. ``print(result)`` shows the table and the sweet spot.

    Args:
        settings: Everything that results must agree on to stand in one table.
        parameters: Parameters of the whole model.
        dense: The score of the dense model.
        points: One per criterion and sparsity.
        tolerance: Largest accepted drop, in points: hundredths of the score.
        confidence: Confidence of the intervals and of the sweet spot.
    """

    settings: Mapping[str, Any]
    parameters: int
    dense: Score
    points: tuple[SweepPoint, ...]
    tolerance: float
    confidence: float

    @property
    def doubt(self) -> str:
        """Why the drops say nothing about what pruning costs, in words; empty if they do."""
        return score_doubt(self.dense, self.confidence)

    @property
    def sweet_spot(self) -> SweepPoint | None:
        """The largest sparsity whose drop is at most the tolerance, with the stated confidence; or None.

        The one-sided upper bound of the paired drop decides, and between criteria the smaller drop. Also None if the
        drops say nothing, see :attr:`doubt`.
        """
        if self.doubt:
            return None
        within = [p for p in self.points if p.sparsity > 0 and p.comparison.upper_bound <= self.tolerance]
        return max(within, key=lambda p: (p.model_sparsity, -p.comparison.drop), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        best = self.sweet_spot
        return {
            "format_version": FORMAT_VERSION,
            "settings": dict(self.settings),
            "parameters": self.parameters,
            "tolerance": self.tolerance,
            "confidence": self.confidence,
            "doubt": self.doubt,
            "sweet_spot": None if best is None else {"criterion": best.criterion, "sparsity": best.sparsity},
            "dense": self.dense.to_dict(),
            "points": [p.to_dict() for p in self.points],
        }

    def rows(self) -> list[dict[str, Any]]:
        """The table as flat rows, the dense model first; scores times 100, in a column named like the metric."""
        metric = self.dense.metric
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
            "p_value": 1.0,
            "prune_seconds": 0.0,
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
                "p_value": p.comparison.p_value,
                "prune_seconds": p.prune_seconds,
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
                "-" if row["criterion"] == "dense" else f"{row['p_value']:.2g}",
            ]
            for row in self.rows()
        ]
        percent = f"{100 * self.confidence:g} %"
        header = ["criterion", "target", "of all weights", "remaining", metric, "drop ± s.e.", percent, "p"]
        where = " ".join(filter(None, [self.dense.source, self.dense.split]))
        test = "McNemar's exact test" if metric == "accuracy" else "a normal test of the drop"
        note = (
            f"n = {self.dense.n} ({where}); drop in points against the dense model on the same examples, its standard "
            f"error and {percent} interval paired, p by {test}."
        )
        warning = [f"Warning: {self.doubt}."] if self.doubt else []
        return "\n".join([*warning, format_table(header, cells), note, self.verdict()])

    def verdict(self) -> str:
        """One sentence that names the sweet spot, or says why there is none."""
        best, percent = self.sweet_spot, f"{100 * self.confidence:g} %"
        if best is not None:
            return (
                f"Sweet spot: {100 * best.sparsity:g} % with {best.criterion}: its measured drop is "
                f"{best.comparison.drop:.2f} points, and with {percent} confidence at most "
                f"{best.comparison.upper_bound:.2f} (tolerance {self.tolerance:g})."
            )
        if not self.points:
            return "Sweet spot: none, since nothing was pruned."
        if self.doubt:
            return f"Sweet spot: none is named, since {self.doubt}."
        lowest = min(self.points, key=lambda p: p.comparison.upper_bound)
        return (
            f"Sweet spot: none of these. The best bound is at {100 * lowest.sparsity:g} % with {lowest.criterion}: at "
            f"most {lowest.comparison.upper_bound:.2f} points with {percent} confidence, above the tolerance of "
            f"{self.tolerance:g}. Try smaller sparsities, more data, or a larger tolerance."
        )

    def write(self, folder: Path) -> list[Path]:
        """Write ``results.json``, ``results.csv`` and ``tradeoff.png``, each atomically.

        Args:
            folder: Where to.

        Returns:
            The files.
        """
        files = [write_json(folder / "results.json", self.to_dict())]
        files.append(write_text(folder / "results.csv", self.to_csv()))
        where = " ".join(filter(None, [self.dense.source, self.dense.split]))
        subtitle = f"{where}, n = {self.dense.n}; bars: {100 * self.confidence:g} % interval of the paired drop"
        name, dense = str(self.settings["model"]), self.dense
        figure = plot_tradeoff(dense.value, self.points, self.sweet_spot, name, subtitle, dense.metric)
        files.append(save_figure(figure, folder / "tradeoff.png"))
        return files
