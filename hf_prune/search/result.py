"""What a search measured: its points, which of them no other beats, the winner and why, as table, JSON and picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.search.goals import Goal, goal_named
from hf_prune.search.plot import plot_search
from hf_prune.search.point import SearchPoint
from hf_prune.utils.figures import save_figure
from hf_prune.utils.files import write_json, write_text
from hf_prune.utils.formatting import format_csv, format_table
from hf_prune.utils.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT_VERSION = 1
PLAIN_COSTS = 0.3  # more that may be lost by a checkpoint that needs no plugin
FILES = ("results.json", "results.csv", "tradeoff.png")


@dataclass(frozen=True, repr=False)
class SearchResult(Result):
    """What :func:`hf_prune.auto_prune` measured and chose. ``print(result)`` shows the table and the reason.

    Args:
        goal: ``"faster"``, ``"smaller"`` or ``"sparser"``.
        max_drop: The largest accepted loss.
        unit: What the loss is in.
        data: What was scored, in words.
        settings: What results must agree on to stand in one table.
        dense_score: Of the dense model.
        dense_size: Bytes of its weights' files, as candidates are saved.
        points: All candidates, in the order in which they were measured.
        stopped: Why the search ended early; empty if it did not.
        reported: The winner's comparison with the dense model on a split that had no influence, in words.
        folder: Where the winner's checkpoint is; None if nothing was within the drop.
        saved: The name of the candidate whose checkpoint is on disk.
        impossible: Why a candidate could not be measured, by its name.
    """

    bars = ("loss", "size", "speedup")

    goal: str
    max_drop: float
    unit: str
    data: str
    settings: Mapping[str, Any]
    dense_score: float
    dense_size: int
    points: tuple[SearchPoint, ...]
    stopped: str = ""
    reported: str = ""
    folder: str | None = None
    saved: str | None = None
    impossible: Mapping[str, str] = field(default_factory=dict)

    @property
    def best(self) -> SearchPoint | None:
        """The point that is closest to the goal among those within the drop; None if there is none."""
        return best_of(self.points, goal_named(self.goal), self.max_drop)

    @property
    def pareto(self) -> tuple[SearchPoint, ...]:
        """The points that no other beats in what the goal asks for and in what is lost."""
        goal = goal_named(self.goal)
        return tuple(point for point in self.points if not any(_beats(other, point, goal) for other in self.points))

    def why(self) -> str:
        """Why the best one won, in a sentence or two."""
        goal, best = goal_named(self.goal), self.best
        if not self.points:
            return "No candidate could be measured."
        if best is None:
            closest = min(self.points, key=lambda point: point.loss.bound)
            tail = f"{closest.name!r} came closest, with {_loss_text(closest)}"
            return f"Nothing is within {self.max_drop:g} {self.unit} with 95 % confidence; {tail}."
        beyond = [point for point in self.points if _key(point, goal) > _key(best, goal)]
        text = (
            f"{best.name!r} is the {_SUPERLATIVE[self.goal]} within {self.max_drop:g} {self.unit}: {_loss_text(best)}."
        )
        if beyond:
            nearest = min(beyond, key=lambda point: point.loss.bound)
            text += f" What goes further loses too much: {nearest.name!r} {_loss_text(nearest)}."
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        best, beaten_by_none = self.best, [point.name for point in self.pareto]
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            "format_version": FORMAT_VERSION,
            **values,
            "settings": dict(self.settings),
            "impossible": dict(self.impossible),
            "points": [point.to_dict() for point in self.points],
            "best": None if best is None else best.name,
            "pareto": beaten_by_none,
            "why": self.why(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """The table as flat rows, the dense model first."""
        best, front = self.best, self.pareto
        dense = {"candidate": "dense", "score": self.dense_score, "loss": 0.0, "standard_error": 0.0, "bound": 0.0}
        dense |= {"size": self.dense_size, "speedup": 1.0, "sparsity": 0.0, "seconds": 0.0, "verdict": ""}
        return [dense] + [
            {
                "candidate": p.name,
                "score": p.score,
                "loss": p.loss.value,
                "standard_error": p.loss.standard_error,
                "bound": p.loss.bound,
                "size": p.size,
                "speedup": p.speedup,
                "sparsity": p.sparsity,
                "seconds": p.seconds,
                "verdict": "chosen" if p is best else "too much" if p.loss.bound > self.max_drop
                else "on the front" if p in front else "beaten",
            }
            for p in self.points
        ]  # fmt: skip

    def __str__(self) -> str:
        header = ["candidate", "score", "lost ± s.e.", "at most", "file", "speed", "gone", "time", ""]
        cells = [
            [
                row["candidate"],
                f"{row['score']:.4f}",
                "-" if row["candidate"] == "dense" else f"{row['loss']:.2f} ± {row['standard_error']:.2f}",
                "-" if row["candidate"] == "dense" else f"{row['bound']:.2f}",
                f"{row['size'] / 1e6:.1f} MB",
                f"{row['speedup']:.2f}x",
                f"{100 * row['sparsity']:.1f} %",
                f"{row['seconds']:.0f} s",
                row["verdict"],
            ]
            for row in self.rows()
        ]
        lines = [format_table(header, cells), f"Scored on {self.data}; lost in {self.unit}.", self.why()]
        lines += [f"{name!r} is not possible: {reason}" for name, reason in self.impossible.items()]
        lines += [f"On a split that had no influence: {self.reported}"] if self.reported else []
        lines += [f"Stopped early: {self.stopped}"] if self.stopped else []
        lines += [f"Saved in {self.folder}."] if self.folder else []
        return "\n".join(lines)

    def plot(self) -> Figure:
        """What each candidate lost against what the goal asks for, with the accepted loss and the winner."""
        title = f"{self.settings.get('model', '')}: {self.goal}"
        return plot_search(self.points, self.best, goal_named(self.goal), self.max_drop, self.unit, title)

    def write(self, folder: Path) -> None:
        """Write ``results.json``, ``results.csv`` and ``tradeoff.png``."""
        write_json(folder / "results.json", self.to_dict())
        rows = self.rows()
        write_text(folder / "results.csv", format_csv(list(rows[0]), rows))
        save_figure(self.plot(), folder / "tradeoff.png")


_SUPERLATIVE = {"faster": "fastest", "smaller": "smallest", "sparser": "sparsest"}


def best_of(points: tuple[SearchPoint, ...], goal: Goal, max_drop: float) -> SearchPoint | None:
    """The point that is closest to a goal among those whose loss is within a bound.

    A point that plain transformers loads is preferred if it is within a twentieth of the best, and loses at most
    ``PLAIN_COSTS`` more.
    """
    within = [point for point in points if point.loss.bound <= max_drop]
    best = max(within, key=lambda point: (_key(point, goal), -point.loss.value), default=None)
    if best is None:
        return None
    if best.plain:
        return best
    alike = [point for point in within if point.plain and _key(point, goal) >= _key(best, goal) - math.log(1.05)]
    alike = [point for point in alike if point.loss.value <= best.loss.value + PLAIN_COSTS]
    return max(alike, key=lambda point: _key(point, goal), default=best)


def _key(point: SearchPoint, goal: Goal) -> float:
    """The logarithm of what a goal asks for, so that more is better."""
    value = math.log(max(getattr(point, goal.measured), 1e-12))
    return value if goal.larger else -value


def _beats(one: SearchPoint, other: SearchPoint, goal: Goal) -> bool:
    mine, theirs = (_key(one, goal), -one.loss.value), (_key(other, goal), -other.loss.value)
    return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))


def _loss_text(point: SearchPoint) -> str:
    return f"lost {point.loss.value:.2f} ± {point.loss.standard_error:.2f}, at most {point.loss.bound:.2f}"
