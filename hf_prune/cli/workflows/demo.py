"""The demo: one model pruned in four ways, and what each costs and brings, measured on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.auto import load_native
from hf_prune.checkpoint.files import size_of_weights
from hf_prune.cli.workflows.loading import load_for_task
from hf_prune.cli.workflows.prune import prune_checkpoint
from hf_prune.conversion.compression import compress_checkpoint
from hf_prune.errors import PlanError
from hf_prune.evaluation.accuracy_result import Evaluation
from hf_prune.evaluation.tasks import ClassificationTask
from hf_prune.inference.acceleration.accelerate import accelerate
from hf_prune.inference.latency import measure_latency
from hf_prune.inference.latency_result import LatencyPoint
from hf_prune.kernels.sparse.build import kernel_problem
from hf_prune.planning.config import PruningConfig
from hf_prune.utils.figures import GREY, PALETTE, literal, panels
from hf_prune.utils.formatting import format_count, format_table
from hf_prune.utils.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH, LENGTH, ROUNDS = 1, 32, 30  # of the timing
DENSE = "dense"
TEXTBOOK = "magnitude, 50 %"
BEST = "best method, 80 %, packed"
FASTER = "heads and neurons, 2×"
SPARSE = "the same 80 %, sparse kernel"
CONFIGS = {
    TEXTBOOK: PruningConfig(sparsity=0.5),
    BEST: PruningConfig(sparsity=0.8, preset="best"),
    FASTER: PruningConfig(target_speedup=2.0, workload={"batch_size": BATCH, "length": LENGTH}, preset="best"),
}
FOLDERS = {TEXTBOOK: "magnitude-50", BEST: "best-80", FASTER: "twice-as-fast"}


@dataclass(frozen=True)
class Outcome:
    """One model of the demo.

    Args:
        name: How it was pruned.
        score: Its accuracy on the held-out sentences.
        bytes: Size of its weight files.
        time: Its time for a sentence, and how many times as fast as the dense model that is.
    """

    name: str
    score: Evaluation
    bytes: int
    time: LatencyPoint


@dataclass(frozen=True, repr=False)
class DemoResult(Result):
    """What the demo measured. ``print(result)`` shows it as a table.

    Args:
        outcomes: The dense model and the pruned ones.
        note: Why one of them is missing; empty if none is.
    """

    outcomes: tuple[Outcome, ...]
    note: str = ""

    bars = ("accuracy", "megabytes", "milliseconds")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [
            {
                "model": o.name,
                "accuracy": o.score.accuracy,
                "standard_error": o.score.standard_error,
                "n": o.score.n,
                "megabytes": o.bytes / 1e6,
                "milliseconds": 1e3 * o.time.median,
                "speedup": None if o.time.against is None else o.time.against.value,
                "is_faster": o.time.against is not None and o.time.against.is_real and o.time.against.value > 1,
            }
            for o in self.outcomes
        ]
        return {"note": self.note, "results": rows}

    def __str__(self) -> str:
        dense = self.outcomes[0]
        rows = [
            [
                o.name,
                f"{100 * o.score.accuracy:.1f} % ± {100 * o.score.standard_error:.1f}",
                f"{format_count(o.bytes)}B",
                f"{dense.bytes / o.bytes:.1f}× smaller" if o.bytes < 0.95 * dense.bytes else "no smaller",
                f"{1e3 * o.time.median:.1f} ms",
                _speed(o.time),
            ]
            for o in self.outcomes
        ]
        rows[0][3] = rows[0][5] = ""
        table = format_table(["", "accuracy", "file", "", "a sentence", ""], rows)
        how = (
            f"Accuracy ± standard error on {dense.score.n:,} held-out sentences; time of {LENGTH} tokens, "
            f"in turns with the dense model."
        )
        return "\n".join([table, how, *([self.note] if self.note else [])])

    def plot(self) -> Figure:
        """Accuracy, size and time of each, side by side."""
        names = [o.name for o in self.outcomes]
        drawn, panes = panels(11.0, 0.9 + 0.5 * len(names), 1, 3)
        accuracy = [100 * o.score.accuracy for o in self.outcomes]
        errors = [100 * o.score.standard_error for o in self.outcomes]
        sizes, times = [o.bytes / 1e6 for o in self.outcomes], [1e3 * o.time.median for o in self.outcomes]
        colours = [GREY, *PALETTE[: len(names) - 1]]
        for axes, values, title, form in (
            (panes[0], accuracy, "accuracy (%)", "{:.1f}"),
            (panes[1], sizes, "file (MB)", "{:.0f}"),
            (panes[2], times, "a sentence (ms)", "{:.1f}"),
        ):
            bars = axes.barh(range(len(names)), values, color=colours, height=0.65)
            room = 12 if axes is panes[0] else 3  # beside the error bars
            axes.bar_label(bars, [form.format(value) for value in values], padding=room, fontsize=9)
            axes.set_title(title, fontsize=10)
            axes.margins(x=0.2)
            axes.grid(axis="y", visible=False)
        panes[0].errorbar(accuracy, range(len(names)), xerr=errors, fmt="none", ecolor=GREY, capsize=3)
        panes[0].set_yticks(range(len(names)), names)
        panes[0].invert_yaxis()
        return literal(drawn)


def _speed(time: LatencyPoint) -> str:
    if time.against is None or not time.against.is_real:
        return "no faster"
    return f"{time.against.value:.2f}× as fast"


def run_demo(
    model: Path, data: Path, out: Path, *, overwrite: bool = False, say: Callable[[str], None] = print
) -> DemoResult:
    """Prune a classifier in four ways, of which two differ in the kernels that run them, and measure all of them.

    Args:
        model: The dense checkpoint.
        data: Its data, with a split ``validation`` that it was not trained on.
        out: Folder for the pruned checkpoints.
        overwrite: Replace what is in the way there.
        say: Takes a line about each step.

    Raises:
        CheckpointError: If something is in the way.
    """
    task = ClassificationTask(str(data))
    models: dict[str, Any] = {}
    models[DENSE], tokenizer = load_for_task(str(model), task)
    notes: list[str] = []
    sizes = {DENSE: size_of_weights(model) or 0}
    for name, config in CONFIGS.items():
        say(f"Pruning: {name}")
        folder = out / FOLDERS[name]
        try:
            prune_checkpoint(str(model), config, folder, task=task, name="demo model", overwrite=overwrite)
        except PlanError as error:  # a machine on which half the time cannot be reached
            if name != FASTER:
                raise
            notes.append(f"Not twice as fast: {error}.")
            continue
        if name == BEST:
            packed = out / f"{folder.name}-packed"
            compress_checkpoint(folder, packed, overwrite=overwrite)
            folder = packed
        models[name], sizes[name] = load_native(str(folder)), size_of_weights(folder) or 0
    if (problem := kernel_problem()) is None:
        say("Choosing kernels for its zeros")
        models[SPARSE], sizes[SPARSE] = load_native(str(out / FOLDERS[BEST])), sizes[BEST]
        accelerate(models[SPARSE], workload={"batch_size": BATCH, "length": LENGTH})
    else:
        notes.append(f"Not on our sparse kernel: {problem}.")
    scores = {name: task.score(each, tokenizer, "validation", progress=name) for name, each in models.items()}
    say("Timing each in turns with the dense model")
    times: dict[str, Any] = {}
    for name, each in models.items():
        if name != DENSE:  # in pairs: a turn of several models would push the weights of each out of the caches
            pair = {DENSE: models[DENSE], name: each}
            timed = measure_latency(pair, batch_sizes=[BATCH], lengths=[LENGTH], rounds=ROUNDS)
            times = {point.model: point for point in timed.points} | times
    return DemoResult(tuple(Outcome(name, scores[name], sizes[name], times[name]) for name in models), " ".join(notes))
